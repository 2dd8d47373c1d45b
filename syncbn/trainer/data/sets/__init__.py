"""Where images come from: sources by name, and the kinds of images that they give."""
