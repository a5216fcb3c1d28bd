/* What the loader asks of a data set beyond its interface. */
#ifndef TEXT_DATASET_IMPL_H
#define TEXT_DATASET_IMPL_H

#include "text/shard.h"

/* Whether a document begins with token `at` of the split. */
bool dataset_document_begins(const struct dataset *d, enum dataset_split split, uint64_t at);
/* The tokenizer's end-of-text token, or -1. */
int64_t dataset_eos(const struct dataset *d);

#endif
