/* What the loader asks of a dataset beyond shard.h. */
#ifndef TEXT_STREAM_H
#define TEXT_STREAM_H

#include "text/shard.h"

/* The end-of-text token, or -1. */
int32_t dataset_eos(const struct dataset *d);
/* The first document start at or after token `from` of a split, or UINT64_MAX. */
uint64_t dataset_document_after(const struct dataset *d, enum dataset_split split, uint64_t from);

#endif
