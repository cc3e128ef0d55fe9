"""Policies that can be sampled from: token ids in, token ids out."""
