"""An HTTP server with OpenAI's interface, over an engine in a thread of its own."""
