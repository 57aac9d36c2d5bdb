// What a call of cosine_ce.cpp prepares: its rows' labels and shares, norms, tile sizes and scratch memory.
// Part of cosine_ce.cpp, which includes it once, after the loops.

namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

constexpr const char* OP = "cosine_ce";

// Whether bfloat16 products run on instructions made for them; asked by a product, as torch may refuse or emulate.
bool low_products() {
  static const bool found = [] {
    bool works = false;
#if defined(__x86_64__)
    if (isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) {
      std::vector<c10::BFloat16> a(32 * 32, 1.0f), b(32 * 32, 2.0f);
      std::vector<float> c(32 * 32);
      try {
        at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, a.data(), b.data(), c.data(), true);
        at::native::cpublas::brgemm_release(true);
        works = c[0] == 64.0f && c[32 * 32 - 1] == 64.0f;
      } catch (const c10::Error&) {
      }
    }
#endif
    return works;
  }();
  return found;
}

// Runs f(task, scratch of this thread) for all tasks.
template <class F>
void parallel(int64_t tasks, int64_t floats, const Tensor& scratch, bool low, F f) {
  fastrex::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    float* own = scratch.mutable_data_ptr<float>() + at::get_thread_num() * floats;
    for (int64_t task = begin; task < end; ++task) f(task, own);
    if (low) at::native::cpublas::brgemm_release(true);
  });
}

// Everything about a call that does not change between its passes.
struct Setup {
  Job job{};
  Tensor x, w, q, cw;
  Tensor floats, labels, spread, sum, scratch;
  float* factors = nullptr;  // [N] what the mean divides by
  float* known = nullptr;    // [N]
  float* bad = nullptr;      // [N] 1 where the label is out of range
  bool low = false;
  int64_t per_thread = 0, tiles = 0, Dp = 0;

  template <class F>
  void each(int64_t tasks, F f) {
    parallel(tasks, per_thread, scratch, low, f);
  }

  Setup(const Tensor& input, const Tensor& weight, const Tensor& target, Optional temperature, double temperature_value,
        Optional class_weight, int64_t first_class, int64_t num_classes, int64_t ignore_index, double smoothing,
        at::ScalarType compute) {
    x = adjacent(input), w = adjacent(weight);
    job.N = x.size(0), job.C = w.size(0), job.D = x.size(1);
    job.x = matrix(OP, x), job.w = matrix(OP, w);
    const double tau = temperature ? temperature->item().toDouble() : temperature_value;
    job.inv_tau = (float)(1.0 / tau);
    // exp(z - 1 / tau) is at least exp(-2 / tau), which must not underflow.
    job.online = !(job.inv_tau <= 40.0f);
    low = compute == at::kBFloat16 && job.D > 0 && low_products();
    Dp = std::max<int64_t>((job.D + 31) / 32 * 32, 32);

    const int64_t most = MAX_R;
    job.R = job.D <= 512 ? most : job.D <= 1024 ? most / 2 : 48;
    job.R = std::min(job.R, (std::max<int64_t>(job.N, 1) + 47) / 48 * 48);
    job.K = std::clamp<int64_t>(32768 / Dp / 32 * 32, 32, 128);
    tiles = (job.N + job.R - 1) / job.R;
    label_rows(target, class_weight, first_class, num_classes, ignore_index, smoothing);

    per_thread = std::max<int64_t>(FASTREX_DISPATCH(scratch_floats, job, low), 64 * Dp);
    scratch = at::empty({fastrex::num_threads(), per_thread}, at::kFloat);
    float* inv_w = const_cast<float*>(job.inv_w);
    float* inv_x = const_cast<float*>(job.inv_x);
    fastrex::parallel_for(0, job.N, 64, [&](int64_t a, int64_t b) {
      FASTREX_DISPATCH(inverse_norms, job.x, a, b, job.D, inv_x);
    });
    fastrex::parallel_for(0, job.C, 64, [&](int64_t a, int64_t b) {
      FASTREX_DISPATCH(inverse_norms, job.w, a, b, job.D, inv_w);
    });
    if (job.smooth != 0.0f) {
      const int64_t chunk = 512, chunks = (job.C + chunk - 1) / chunk;
      spread = at::zeros({Dp}, at::kFloat);
      const Tensor parts = at::empty({chunks, Dp}, at::kFloat);
      each(chunks, [&](int64_t i, float* own) {
        const int64_t end = std::min(job.C, (i + 1) * chunk);
        FASTREX_DISPATCH(weighted_classes, job, i * chunk, end, parts.mutable_data_ptr<float>() + i * Dp, own);
      });
      add_up(parts, chunks, spread.mutable_data_ptr<float>());
      if (!job.q.data) job.spread = spread.const_data_ptr<float>();
    }
  }

  void add_up(const Tensor& parts, int64_t count, float* out) const {
    const float* p = parts.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < job.D; ++d) out[d] += p[i * Dp + d];
  }

  void label_rows(const Tensor& target, Optional class_weight, int64_t first_class, int64_t num_classes,
                  int64_t ignore_index, double smoothing) {
    const int64_t N = job.N, C = job.C;
    const float* factor = nullptr;
    double factor_sum = (double)num_classes;
    if (class_weight) {
      cw = class_weight->to(at::kFloat).contiguous();
      factor = cw.const_data_ptr<float>();
      factor_sum = 0;
      for (int64_t c = 0; c < num_classes; ++c) factor_sum += factor[c];
      job.class_factor = factor + first_class;
    }
    job.smooth = (float)(smoothing / (double)num_classes);
    floats = at::empty({8 * N + C}, at::kFloat);
    labels = at::empty({N}, at::kLong);
    float* at = floats.mutable_data_ptr<float>();
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    job.inv_w = take(C), job.inv_x = take(N);
    float *total = take(N), *own = take(N);
    known = take(N), factors = take(N), bad = take(N);
    job.factor = take(N), job.target_z = take(N);
    int64_t* label = labels.mutable_data_ptr<int64_t>();
    job.total = total, job.own = own, job.row_known = known, job.label = label;
    const int64_t given = target.size(0);
    if (target.is_floating_point()) {
      q = adjacent(target.scalar_type() == at::kDouble ? target.to(at::kFloat) : target);
      job.q = matrix(OP, q), job.q_rows = given;
      job.q_scale = (float)(1.0 - smoothing), job.q_add = job.smooth;
      fastrex::parallel_for(0, given, 16, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) soft_row(b, num_classes, first_class, factor, factor_sum, label, total);
      });
      for (int64_t n = 0; n < N; ++n) {
        label[n] = label[n % given], total[n] = total[n % given];
        own[n] = 0.0f, known[n] = 1.0f, factors[n] = 1.0f, bad[n] = 0.0f;
      }
      job.q.data += first_class * job.q.size();
      return;
    }
    const Tensor ids = target.contiguous();
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < N; ++n) {
      const int64_t y = id[n % given];
      const bool ignored = y == ignore_index, valid = y >= 0 && y < num_classes && !ignored;
      const double weight = valid && factor ? factor[y] : 1.0;
      known[n] = valid, bad[n] = !ignored && !valid, factors[n] = ignored ? 0.0f : (float)weight;
      // An ignored row's rank is not counted, so its label does not matter.
      label[n] = valid && y >= first_class && y < first_class + C ? y - first_class : -1;
      total[n] = valid ? (float)((1.0 - smoothing) * weight + smoothing / (double)num_classes * factor_sum) : 0.0f;
      own[n] = label[n] >= 0 ? (float)((1.0 - smoothing) * weight) : 0.0f;
    }
  }

  void soft_row(int64_t b, int64_t num_classes, int64_t first_class, const float* factor, double factor_sum,
                int64_t* label, float* total) const {
    double shares = 0;
    int64_t best = 0;
    const auto scan = [&](const auto* p) {
      for (int64_t c = 0; c < num_classes; ++c) {
        shares += (double)(float)p[c] * (factor ? factor[c] : 1.0f);
        if ((float)p[c] > (float)p[best]) best = c;
      }
    };
    const char* row = job.q.row(b);
    if (job.q.kind == Kind::f32) scan((const float*)row);
    else if (job.q.kind == Kind::bf16) scan((const c10::BFloat16*)row);
    else scan((const c10::Half*)row);
    total[b] = (float)(job.q_scale * shares + (double)job.q_add * factor_sum);
    label[b] = best >= first_class && best < first_class + job.C ? best - first_class : -1;
  }

  int64_t kept_per_class() const { return job.R * (low ? 2 : 4); }
  bool fits() const { return job.C * kept_per_class() <= KEPT_BYTES; }

  void sum_of_rows() {
    if (job.smooth == 0.0f || job.q.data) return;
    sum = at::zeros({Dp}, at::kFloat);
    const Tensor parts = at::empty({tiles, Dp}, at::kFloat);
    each(tiles, [&](int64_t t, float* own) {
      FASTREX_DISPATCH(sum_tile, job, t, own, parts.mutable_data_ptr<float>() + t * Dp);
    });
    add_up(parts, tiles, sum.mutable_data_ptr<float>());
    job.sum = sum.const_data_ptr<float>();
  }

  int64_t vectors() const {
    const int64_t width = isa() == Isa::avx512 ? 16 : isa() == Isa::avx2 ? 8 : 4;
    return (job.D + width - 1) / width * width;
  }
};

}  // namespace
