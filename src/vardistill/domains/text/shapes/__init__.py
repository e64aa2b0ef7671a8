"""Text to image on a laptop: captioned pictures from a formula, a judge that knows the truth, a pipeline of both."""
