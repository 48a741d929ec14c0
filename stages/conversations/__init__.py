"""Reads a user's conversations, from files of every format that is taken, into canonical rows."""
