"""Soft prompts as files: Overture's own format (`native`) and the formats of others."""
