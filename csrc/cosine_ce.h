// What cosine_ce.cpp and its loops exchange: plain pointers, so that the loops see no torch and no standard library.
#pragma once

#include <cstdint>

#include "rows.h"

namespace fastrex::cosine_ce {

// One pass over a block of rows and a range of classes, with everything a task needs.
struct Job {
  int64_t N, C, D;
  Matrix x, w;
  const float *inv_x, *inv_w;  // 1 / norm, 0 for a row or class that counts as zero
  float inv_tau;
  // Of every row: the class in this block (or -1), A = the sum of the target shares, and the share of that class alone.
  const int64_t* label;
  const float *total, *own;
  const float* threshold;  // given from outside, or null
  const float* spread;     // [D] sum of the smoothing's shares times w_hat, or null
  // Soft targets: share of class c of this block is (q * q_scale + q_add) * class_factor[c].
  Matrix q;
  int64_t q_rows;
  float q_scale, q_add;
  const float* class_factor;  // of this block, or null
  // Backward: the rows' log-sum-exp and upstream gradient; null in the forward.
  const float *given, *grad;
  bool want_dx, online;
  // The pass: rows [row0, row1) in tiles of R, classes [class0, class1) in S splits of blocks of K.
  int64_t row0, row1, class0, class1, R, K, S;
  bool add;  // partial_dx holds the sum of earlier classes
  // e of the pass, [tile][class][R], in float or bfloat16; null where no gradient of the classes is wanted.
  char* keep;
  // Per split and row of [base, base + span): maximum and sum of the exponentials, larger logits, soft logit, and
  // the sum of e z (with ``given`` of dL/dz z), which is the gradient's part along x_hat.
  int64_t base, span;
  float *part_m, *part_s, *part_soft, *part_along;
  int32_t* part_count;
  float* block_m;     // online: the maximum that a block's e are relative to, [block][row of the pass]
  float* partial_dx;  // [S][span][Dp], or null: a tile has one task, which finishes it
  // Out, [N].
  float *lse, *target_logit, *radial, *target_z;
  int64_t* rank;
  const float* row_known;  // 1: a row that counts, 0: ignored or with a bad label
  char* dx;
  Kind dx_kind;
  // For the gradient of the classes.
  float* factor;      // [N] of x_hat
  char* packed_rows;  // x_hat times factor, packed per tile of the pass
  const float* sum;   // [Dp] sum of known rows' x_hat * grad / tau for the smoothing, or null
  float smooth;       // label_smoothing / num_classes
  float* accumulated; // [class1 - class0][D] float, between row blocks
  bool first, last;
  char* dw;
  Kind dw_kind;
};

}  // namespace fastrex::cosine_ce
