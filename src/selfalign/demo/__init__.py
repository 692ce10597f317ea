"""The demo: a fictional atlas, the tiny base that has read it, and the files of the demo recipe."""
