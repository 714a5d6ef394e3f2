"""The server: OpenAI's API and a chat page over one base and the adapters of a study."""
