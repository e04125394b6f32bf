"""Widgets: what draws progress and tables, for `cli` and `demo`.

It knows terminals (width, colour, TTY or not) and how to make foreign text harmless; rich is imported on a TTY only.
Types: `Listener` (a renderer of progress), `Table`.
"""
