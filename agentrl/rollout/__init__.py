"""Plays episodes: one coroutine each, limits and deadlines around them, trees out."""
