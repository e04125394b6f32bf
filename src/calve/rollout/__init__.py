"""What happens to a fleet: a release is put on it, watched, judged, and taken back where it is bad.

`judge` and `steps` decide, from an `observation` and nothing else; `observe` looks, `run` acts, round after round.
State is read from AWS again in every round: whoever was killed, or joins later, is in the same case as the next round.
"""
