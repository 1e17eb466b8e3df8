"""Rows to train on: the engine, the verifier and a teacher put together."""
