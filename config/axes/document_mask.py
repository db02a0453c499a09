# text sees its own document only, in both stages; after config/text.py, or config/ckpt80_img10.py and its start
name, document_mask, init_from = f'{name}_documents', True, init_from.replace('/text/', '/text_documents/')
