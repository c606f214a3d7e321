"""Checkpoints that can be resumed exactly."""
