"""Models: what they can do (base), how they are kept (bundle), and the families."""
