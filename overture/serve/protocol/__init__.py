"""What goes over the wire, in the shapes of OpenAI's API."""
