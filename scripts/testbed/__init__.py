"""What the verbs share; here, and only here, the four packages meet."""
