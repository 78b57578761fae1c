"""Translation of a provider's verified JSON, of any API version, into facts."""
