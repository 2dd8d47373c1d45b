"""The trainer: `pip install syncbn[train]`. It knows the operator by its face, `import syncbn`, and no deeper."""
