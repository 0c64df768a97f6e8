"""The embedded shapes world: captions, renderer, exact checker, and how its teacher was made."""
