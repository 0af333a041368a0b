"""Turns videos into a manifest of clips: one stage a file, each leaving scores that the next one reads."""
