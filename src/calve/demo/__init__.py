"""Sample systems out of Debian packages, the show, the report.

Knows apt, .deb files and what replaces Debian's maintainer scripts; turns packages into content-addressed store paths
with their references and assembles them into bootable toplevels, without Nix and without root.
Types: Packages, Deb, Component, Farm, Kernel, System.
"""
