"""The quality lab: a small multimodal mixture of experts, trained and judged here."""
