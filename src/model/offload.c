/* Offloading: what the layers keep for the backward pass waits in the host's memory.
 *
 * Layer l's input lies in instance l mod 3 of A_X, what else it keeps in group l mod 2 (all of it,
 * or with full recomputation none: activations.h). The last two layers stay. Of each other one both
 * leave as soon as its forward pass has ended, in one copy each, while the next layer is computed;
 * they come back when the layer two above has gone backward and left its group, while the one
 * between goes backward:
 *
 *   forward    compute  0   1   2   3 ...          backward   compute  ... 3   2   1   0
 *              copies       0   1   2 ...                     copies       ... 1   0
 *
 * Forward l waits for the copy of l - 2, whose group and input it writes over (its output is input
 * l + 1, the place of l - 2); backward l for its own. A third group would not hide more: a layer's
 * copy has a layer's time either way.
 *
 * What it takes (bytes and FLOP of a token and layer of width D, an MLP of 4 D, bf16): no
 * recomputation keeps 36 D bytes, selective 24 D, full 4 D, for 24 D^2 FLOP forward (and 48 or 72
 * D^2 backward). Over PCIe 5 (55 GB/s) at 400 TFLOP/s a byte costs as much as 7300 FLOP: copies
 * are hidden from D = 10900, 7300 and 1200 on; over a link of 450 GB/s from 1340, 890 and 150. So
 * on PCIe offloading belongs with full recomputation. */
#include "model/internal.h"

static bool leaves(const struct pass *p, int layer) {
    return p->keep && p->w->host && layer >= 0 && layer < p->w->layout.leaving;
}

static int mark_of(const struct pass *p, int layer) {
    return layer % (int)p->w->layout.groups;
}

/* One piece of a layer, to the host or back. */
static tril_status piece_copy(struct pass *p, int layer, bool back, char *here, char *there,
                              int64_t bytes, struct tril_error *err) {
    if (bytes == 0)
        return TRIL_OK;
    return p->ctx->backend->copy_begin(p->ctx, mark_of(p, layer), back ? here : there,
                                       back ? there : here, bytes, err);
}

static tril_status layer_copy(struct pass *p, int layer, bool back, struct tril_error *err) {
    tril_status st;
    const struct activation_layout *l = &p->w->layout;
    char *there = p->w->host + layer * (l->input + l->group);
    char *x = p->w->arena + l->offset[A_X] + layer % l->inputs * l->input;
    char *group = p->w->arena + l->group_offset + layer % l->groups * l->group;
    TRY(piece_copy(p, layer, back, x, there, l->input, err));
    TRY(piece_copy(p, layer, back, group, there + l->input, l->group, err));
done:
    return st;
}

static tril_status layer_wait(struct pass *p, int layer, struct tril_error *err) {
    return p->ctx->backend->copy_wait(p->ctx, mark_of(p, layer), err);
}

tril_status offload_before_forward(struct pass *p, int layer, struct tril_error *err) {
    const int before = layer - (int)p->w->layout.groups;
    return leaves(p, before) ? layer_wait(p, before, err) : TRIL_OK;
}

tril_status offload_after_forward(struct pass *p, int layer, struct tril_error *err) {
    return leaves(p, layer) ? layer_copy(p, layer, false, err) : TRIL_OK;
}

tril_status offload_before_backward(struct pass *p, int layer, struct tril_error *err) {
    return leaves(p, layer) ? layer_wait(p, layer, err) : TRIL_OK;
}

tril_status offload_after_backward(struct pass *p, int layer, struct tril_error *err) {
    const int before = layer - (int)p->w->layout.groups;
    return leaves(p, before) ? layer_copy(p, before, true, err) : TRIL_OK;
}
