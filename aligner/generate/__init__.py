"""Response generation.

Read `engine` first: the interface of all engines (Megatron, an OpenAI-compatible server, vLLM). `generation` is the
`generate-responses` command. `requests` and `journal` write one result per request, across kills and restarts.
"""
