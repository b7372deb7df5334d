"""From prompts to responses.

Read `engine` first: the interface of all engines (Megatron here, an OpenAI-compatible server, vLLM). `generation` is the
`generate-responses` command; `requests` and `journal` answer each request once, whatever is killed in between.
"""
