"""Widgets: what draws progress and tables, for `cli` and `demo`.

It knows terminals (width, colour, TTY or not) and how to make foreign text harmless; rich is imported on a TTY only.
Types: `listener.Listener` (Plain, Lines, Terminal: renderers of progress), `live.Board`; `table.table` prints one.
"""
