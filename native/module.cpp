// What Python sees: one function over tensors of any library that speaks DLPack, and which processors' instructions are at hand.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "attention.hpp"
#include "levels.hpp"
#include "reading.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using twofold::Call;
using twofold::Kind;
using Tensor = nb::ndarray<nb::ro, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::device::cpu, nb::c_contig>;
using Numbers = nb::ndarray<const int64_t, nb::device::cpu, nb::c_contig>;
using Truths = nb::ndarray<const bool, nb::ndim<2>, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<4>, nb::device::cpu, nb::c_contig>;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

Kind kind_of(const Tensor& tensor, const char* name) {
    const nb::dlpack::dtype type = tensor.dtype();
    const auto is = [&](nb::dlpack::dtype_code code, int bits) { return type.code == static_cast<uint8_t>(code) && type.bits == bits && type.lanes == 1; };
    if (is(nb::dlpack::dtype_code::Float, 32)) return Kind::f32;
    if (is(nb::dlpack::dtype_code::Float, 16)) return Kind::f16;
    if (is(nb::dlpack::dtype_code::Bfloat, 16)) return Kind::bf16;
    if (is(nb::dlpack::dtype_code::Int, 8)) return Kind::i8;
    refuse(std::string(name) + " must hold float32, float16, bfloat16 or int8.");
}

void expect(bool holds, const char* what) {
    if (!holds) refuse(what);
}

const char* bytes(const Tensor& tensor) { return static_cast<const char*>(tensor.data()); }

twofold::Rows rows(const Tensor& tensor, const char* name) {
    if (tensor.ndim() != 4) refuse(std::string(name) + " must have four dimensions.");
    if (tensor.stride(3) != 1 && tensor.shape(3) > 1) refuse(std::string("the numbers of a row of ") + name + " must lie side by side.");
    return {bytes(tensor), kind_of(tensor, name), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// [B, G, S, 1], one for a token, or [B, G, 1, D], one for a channel; 1 may stand for B and G. In pages, [N, G, tokens of a page, 1].
twofold::Scales scales(const std::optional<Tensor>& given, const Tensor& codes) {
    if (!given) return {};
    const Tensor& tensor = *given;
    expect(tensor.ndim() == 4 && kind_of(tensor, "scales") == Kind::f32, "scales must be float32 and have four dimensions.");
    const bool of_tokens = tensor.shape(3) == 1;
    for (size_t i = 0; i < 2; ++i) expect(tensor.shape(i) == codes.shape(i) || (tensor.shape(i) == 1 && !(of_tokens && i == 0)), "scales must have as many sequences and heads as the codes, or one.");
    expect(of_tokens ? tensor.shape(2) == codes.shape(2) : tensor.shape(2) == 1 && tensor.shape(3) == codes.shape(3), "scales must be one for each token, or one for each channel.");
    const auto* data = reinterpret_cast<const float*>(bytes(tensor));
    const auto stride = [&](size_t i) { return tensor.shape(i) == 1 ? 0 : tensor.stride(i); };
    expect(of_tokens || tensor.stride(3) == 1, "the scales of channels must lie side by side.");
    return {of_tokens ? data : nullptr, of_tokens ? nullptr : data, stride(0), stride(1), of_tokens ? tensor.stride(2) : 0};
}

twofold::Table table(const std::optional<Tensor>& cosine, const std::optional<Tensor>& sine, int64_t distance, bool is_steady, int64_t batch, int64_t keys, int64_t dim) {
    if (!cosine) return {};
    expect(sine && cosine->ndim() == sine->ndim() && (cosine->ndim() == 2 || cosine->ndim() == 3), "cosine and sine must both have two or three dimensions.");
    for (size_t i = 0; i < cosine->ndim(); ++i)
        expect(cosine->shape(i) == sine->shape(i) && (cosine->stride(i) == sine->stride(i) || cosine->shape(i) == 1), "cosine and sine must have one shape and lie alike.");
    const size_t last = cosine->ndim() - 1;
    const auto pairs = static_cast<int64_t>(cosine->shape(last));
    expect(static_cast<int64_t>(cosine->shape(last - 1)) == keys, "cosine and sine must have a row for each key.");
    expect(last == 1 || static_cast<int64_t>(cosine->shape(0)) == batch, "cosine and sine must have a table for each sequence, or one.");
    expect(pairs == 0 || cosine->stride(last) == 1, "the numbers of a row of cosines must lie side by side.");
    expect(distance >= pairs && distance + pairs <= dim, "dimension i turns with dimension i + distance: both must be dimensions of the key.");
    const Kind kind = kind_of(*cosine, "cosine");
    expect(kind == kind_of(*sine, "sine"), "cosine and sine must have one dtype.");
    return {bytes(*cosine), bytes(*sine), kind, last == 2 ? cosine->stride(0) : 0, cosine->stride(last - 1), pairs, distance, is_steady};
}

const int64_t* numbers(const std::optional<Numbers>& given, int64_t count, const char* what) {
    if (!given) return nullptr;
    expect(given->ndim() == 1 && static_cast<int64_t>(given->shape(0)) == count, what);
    return given->data();
}

void attend(const Floats& query, const Result& output, const Tensor& key, const std::optional<Tensor>& value, float scale, bool is_causal, int64_t window,
            float soft_cap, bool query_is_bfloat16, const std::optional<Tensor>& extension, const std::optional<Floats>& key_scale,
            const std::optional<Tensor>& cosine, const std::optional<Tensor>& sine, int64_t distance, bool is_steady, const std::optional<Floats>& sinks,
            const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales, const std::optional<Numbers>& lengths,
            const std::optional<Numbers>& query_positions, const std::optional<Numbers>& key_positions, const std::optional<Truths>& key_mask,
            const std::optional<Numbers>& pages, int threads, const std::string& level) {
    const Tensor& held = value ? *value : key;
    Call call;
    expect(query.ndim() == 4, "query must have four dimensions.");
    call.batch = static_cast<int64_t>(query.shape(0));
    call.heads = static_cast<int64_t>(query.shape(1));
    call.queries = static_cast<int64_t>(query.shape(2));
    call.key = rows(key, "key"), call.value = rows(held, "value");
    call.shares_value = call.key.data == call.value.data && call.key.kind == call.value.kind && call.key.batch_stride == call.value.batch_stride &&
                        call.key.head_stride == call.value.head_stride && call.key.row_stride == call.value.row_stride;
    call.kv_heads = static_cast<int64_t>(key.shape(1));
    call.key_dim = static_cast<int64_t>(key.shape(3)), call.value_dim = static_cast<int64_t>(held.shape(3));
    for (size_t i = 0; i < 3; ++i) expect(key.shape(i) == held.shape(i), "key and value must have the same sequences, heads and tokens.");
    expect(call.kv_heads > 0 && call.heads % call.kv_heads == 0, "the heads of the query must be a multiple of those of the key.");
    call.keys = static_cast<int64_t>(key.shape(2));
    if (pages) {
        expect(pages->ndim() == 2 && static_cast<int64_t>(pages->shape(0)) == call.batch, "pages must have a row for each sequence.");
        call.pages = pages->data();
        call.pages_per_sequence = static_cast<int64_t>(pages->shape(1)), call.page_tokens = call.keys;
        call.keys *= call.pages_per_sequence;
        for (int64_t i = 0; i < call.batch * call.pages_per_sequence; ++i)
            expect(call.pages[i] >= 0 && call.pages[i] < static_cast<int64_t>(key.shape(0)), "pages must be numbers of pages that there are.");
    } else {
        expect(static_cast<int64_t>(key.shape(0)) == call.batch, "query and key must have the same number of sequences.");
    }
    if (extension) {
        call.extension = rows(*extension, "extension");
        call.extension_dim = static_cast<int64_t>(extension->shape(3));
        expect(!pages && extension->shape(1) == 1 && static_cast<int64_t>(extension->shape(0)) == call.batch && static_cast<int64_t>(extension->shape(2)) == call.keys, "extension must be [B, 1, S, dim].");
    }
    expect(static_cast<int64_t>(query.shape(3)) == call.key_dim + call.extension_dim, "a query must be as long as a key and its extension.");
    expect(static_cast<int64_t>(output.shape(0)) == call.batch && static_cast<int64_t>(output.shape(1)) == call.heads && static_cast<int64_t>(output.shape(2)) == call.queries && static_cast<int64_t>(output.shape(3)) == call.value_dim, "output must be [B, H, T, dim of values].");
    expect(!key_scale || static_cast<int64_t>(key_scale->size()) == call.key_dim, "key_scale must be as long as a key.");
    expect(!sinks || static_cast<int64_t>(sinks->size()) == call.heads, "sinks must be one for each head of the query.");
    call.key_scales = scales(key_scales, key), call.value_scales = scales(value ? value_scales : key_scales, held);
    call.table = table(cosine, sine, distance, is_steady, call.batch, call.keys, call.key_dim);
    call.query = query.data(), call.output = output.data();
    call.key_scale = key_scale ? key_scale->data() : nullptr, call.sinks = sinks ? sinks->data() : nullptr;
    call.lengths = numbers(lengths, call.batch, "lengths must be one for each sequence.");
    for (int64_t i = 0; call.lengths && i < call.batch; ++i) expect(call.lengths[i] >= 0 && call.lengths[i] <= call.keys, "lengths must be between 0 and the number of keys.");
    call.query_positions = numbers(query_positions, call.queries, "query_positions must be one for each query.");
    call.key_positions = numbers(key_positions, call.keys, "key_positions must be one for each key.");
    if (key_mask) {
        expect(static_cast<int64_t>(key_mask->shape(0)) == call.batch && static_cast<int64_t>(key_mask->shape(1)) == call.keys, "key_mask must be [B, S].");
        call.key_mask = reinterpret_cast<const uint8_t*>(key_mask->data());
        call.mask_batch_stride = key_mask->stride(0), call.mask_row_stride = key_mask->stride(1);
    }
    call.is_causal = is_causal, call.window = window, call.scale = scale, call.soft_cap = soft_cap;
    const bool narrow = query_is_bfloat16 && (call.key.kind == Kind::bf16 || call.key.kind == Kind::i8);
    const twofold::Level& chosen = twofold::level_for(narrow, level);
    nb::gil_scoped_release others_may_run;
    twofold::attention(call, chosen, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Attention of a few queries over many keys on a processor, reading one tensor as keys and values.";
    m.def("attend", &attend, "query"_a, "output"_a, "key"_a, "value"_a.none() = nb::none(), nb::kw_only(), "scale"_a, "is_causal"_a, "window"_a, "soft_cap"_a,
          "query_is_bfloat16"_a, "extension"_a = nb::none(), "key_scale"_a = nb::none(), "cosine"_a = nb::none(), "sine"_a = nb::none(), "distance"_a = 0,
          "is_steady"_a = false, "sinks"_a = nb::none(), "key_scales"_a = nb::none(), "value_scales"_a = nb::none(), "lengths"_a = nb::none(),
          "query_positions"_a = nb::none(), "key_positions"_a = nb::none(), "key_mask"_a = nb::none(), "pages"_a = nb::none(), "threads"_a, "level"_a = "",
          "Fills `output`. Raises ValueError for shapes that do not fit.");
    m.def("read", [](const nb::ndarray<nb::ro, nb::device::cpu, nb::c_contig>& tensor, int threads) {
        const nb::gil_scoped_release others_may_run;
        return twofold::read(static_cast<const char*>(tensor.data()), tensor.nbytes(), threads);
    }, "tensor"_a, nb::kw_only(), "threads"_a, "The sum of a tensor's whole 64-bit words, wrapping around, as fast as its memory can be read.");
    m.def("levels", [] {
        std::vector<std::string> names;
        for (const twofold::Level* level : twofold::levels()) names.emplace_back(level->name);
        return names;
    }, "The ways to compute that this processor knows, from the slowest to the fastest.");
}
