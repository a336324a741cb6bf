"""Tests of what a trained model can do: GPT-3's own tasks, multiple choice, EleutherAI's (L3)."""
