"""The HTTP server: the app, the OpenAI API and the web page. Requests become engine requests here."""
