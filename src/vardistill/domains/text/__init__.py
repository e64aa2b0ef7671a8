"""Text to image: pictures, or latents of them, under prompts."""
