"""Which factors tasks select: read at the prompt, kept on disk, drawn as maps and measured (`mixlora tsne`)."""
