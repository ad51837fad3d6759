"""A long text as a short prompt: self-study, and a teacher that is the base itself with the text in its context.

Source: Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266).
"""
