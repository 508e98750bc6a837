"""The page of `acformer demo`: an image, its anchors, and answers with what they cost.

`app` alone knows gradio, and `request_filter` whom it serves. What a visitor can do is in `session`, on models that are
not changed for it: `encoded_image` (image to patches), `pins` (patches that shall or shall not be anchors),
`demo_model` (answers and their cost), `canvas` and `page_html` (what is drawn and written), `examples` (what a visitor
can begin with), `page_setup` (which models).
"""
