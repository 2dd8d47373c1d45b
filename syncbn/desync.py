"""Notice when ranks run different layers."""
