"""The only package that imports Ray: it runs the plain jobs of `labelling` and `training` on many processes."""
