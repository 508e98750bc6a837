"""The page of `acformer demo`: a picture, its anchors, and answers with what they cost.

`app` alone knows gradio. What a visitor can do is in `visit`, on models that are not changed for it: `look` (picture
to patches), `pins` (patches that shall or shall not be anchors), `respondent` (answers and their cost), `canvas` and
`ledger` (what is drawn and written), `examples` (what a visitor can begin with), `start` (which models).
"""
