"""Draws and grades answers and makes them rows to train on; the teacher; and sampling of demonstrations."""
