// Attention of the queries that read one KV head over a run of its keys, tile by tile; each tile is read from memory once and serves both products.
//
// `Products` computes them (float_products.hpp, bfloat16_products.hpp) from rows of its own `Number`. Rows that are stored so are read where they lie; others
// (codes, other floats, tiles that are not full or not wholly seen, rows that do not divide into steps) are copied first, widened and filled up with zeros.
#pragma once

#include "call.hpp"
#include "float_products.hpp"
#include "view.hpp"

namespace {

using namespace twofold;

constexpr float NOTHING = -__builtin_inff();

// Hands out parts of a piece of memory, at the boundaries of cache lines; without one it only counts.
struct Shelf {
    char* memory;
    size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* found = reinterpret_cast<T*>(memory + used);
        used += static_cast<size_t>(up(count * static_cast<int64_t>(sizeof(T)), 64));
        return found;
    }
};

// What a thread's memory begins with: for which sequence of which call its table of relative turns was made. Memory that is new is 0 here.
struct Kept {
    uint64_t serial;
    int64_t sequence;
};

// `dim` numbers of a row as floats.
template <class Stored>
inline void widen_row(const Stored* from, int64_t dim, float* to) {
    int64_t i = 0;
    for (; i + W <= dim; i += W) store(to + i, widen(from + i));
    if (i < dim) {
        Stored last[W] = {};
        std::memcpy(last, from + i, static_cast<size_t>(dim - i) * sizeof(Stored));
        float wide[W];
        store(wide, widen(last));
        std::memcpy(to + i, wide, static_cast<size_t>(dim - i) * 4);
    }
}

inline void widen_row(Kind kind, const char* from, int64_t dim, float* to) {
    switch (kind) {
        case Kind::f32: return widen_row(reinterpret_cast<const float*>(from), dim, to);
        case Kind::bf16: return widen_row(reinterpret_cast<const uint16_t*>(from), dim, to);
        case Kind::f16: return widen_row(reinterpret_cast<const Half*>(from), dim, to);
        case Kind::i8: return widen_row(reinterpret_cast<const int8_t*>(from), dim, to);
    }
}

// Where row `token` of a head lies.
inline const char* row_of(const Call& call, const Rows& rows, int64_t sequence, int64_t head, int64_t token) {
    if (call.pages) {
        const int64_t page = call.pages[sequence * call.pages_per_sequence + token / call.page_tokens];
        sequence = page, token %= call.page_tokens;
    }
    const int64_t index = sequence * rows.batch_stride + head * rows.head_stride + token * rows.row_stride;
    return rows.data + index * static_cast<int64_t>(bytes_of(rows.kind));
}

// In which order the lines of a tile are asked for: some of each page of memory in turns. A processor foresees what follows in several pages at once, and begins anew
// with each page; asked for page by page a tile takes longer to come.
class Order {
   public:
    Order(const Rows& rows, int64_t dim, int64_t tokens)
        : bytes_(dim * static_cast<int64_t>(bytes_of(rows.kind))), step_(rows.row_stride * static_cast<int64_t>(bytes_of(rows.kind))), tokens_(tokens) {}

    int64_t most_lines() const { return tokens_ * (up(bytes_, LINE) / LINE) + PIECE / LINE; }

    // How many lines a tile has, and their places.
    int64_t make(int32_t* places) const {
        const bool is_whole = step_ == bytes_;
        const int64_t piece = is_whole ? PIECE : bytes_, step = is_whole ? PIECE : step_, pieces = is_whole ? up(tokens_ * bytes_, PIECE) / PIECE : tokens_;
        if (pieces * step > INT32_MAX) return 0;
        const int64_t pages = pieces * step / PAGE, of_one = pages < 1 ? pieces : pages < pieces ? (pieces + pages - 1) / pages : 1;
        int64_t lines = 0;
        for (int64_t first = 0; first < of_one; ++first)
            for (int64_t at = first; at < pieces; at += of_one)
                for (int64_t byte = 0; byte < piece; byte += LINE) places[lines++] = static_cast<int32_t>(at * step + byte);
        return lines;
    }

    // Where a page lies takes long to find out, and holds up the lines that are asked for behind: here a core finds several at once, during the products.
    static void find_pages(const char* tile, int64_t bytes) {
        for (int64_t at = 0; at < bytes; at += PAGE) ask_soon(tile + at);
    }

   private:
    static constexpr int64_t LINE = 64, PIECE = 256, PAGE = 4096;
    int64_t bytes_, step_, tokens_;
};

template <class Products>
struct Attention {
    using Number = typename Products::Number;
    using Turned = typename Products::Turned;
    static constexpr Kind OWN = sizeof(Number) == 4 ? Kind::f32 : sizeof(Number) == 2 ? Kind::bf16 : Kind::i8;

    const Call& call;
    const int64_t sequence, head;
    const int64_t rows, key_dim, value_dim, turned_dim, extension_dim, raw_dim;
    const int64_t tile_tokens, strip_tokens;  // of a strip: keys that turn together
    const bool does_turn, has_still;
    Shelf shelf;
    Kept* kept;
    Number *still_query, *extension_query, *raw, *values, *extension;
    Turned *turned_query, *turned;
    float *turning, *made, *scale, *turning_scale, *turns, *turn_of_strip, *turn_of_queries, *row, *logits;
    int64_t token_of_queries = -TILE - 1, turned_on = 0;  // none yet
    View view;
    int32_t *places, *places_of_values, *places_of_extension;
    Ahead of_keys, of_values, of_extension;
    char* products;

    static int64_t padded(int64_t dim) { return up(dim, Products::STEP); }

    // A tile that the first level of caches does not hold, beside what has turned, would come from the second one twice.
    static int64_t tokens_of_tile(const Call& call, int64_t dim, int64_t turned_dim) {
        const int64_t size = static_cast<int64_t>(sizeof(Number)), most = dim * size > 512 ? TILE / 4 : dim * size > 128 || turned_dim * static_cast<int64_t>(sizeof(Turned)) > 64 ? TILE / 2 : TILE;
        return call.pages && call.page_tokens < most ? call.page_tokens : most;
    }

    // What has turned, and the rows by which, are to stay in the first level of caches beside the tile.
    static int64_t tokens_of_strip(int64_t tokens, int64_t dim) {
        const int64_t most = dim * static_cast<int64_t>(sizeof(Turned)) > 128 ? TILE / 4 : TILE / 2;
        return tokens < most ? tokens : most;
    }

    Attention(const Call& c, int64_t s, int64_t h, char* memory)
        : call(c), sequence(s), head(h), rows(c.rows()), key_dim(padded(c.key_dim)), value_dim(padded(c.value_dim)),
          turned_dim(2 * up(c.table.pairs, Products::PAIRS)), extension_dim(padded(c.extension_dim)),
          raw_dim(c.shares_value && value_dim > key_dim ? value_dim : key_dim), tile_tokens(tokens_of_tile(c, raw_dim, turned_dim)),
          strip_tokens(tokens_of_strip(tile_tokens, turned_dim)), does_turn(c.table.pairs > 0),
          has_still(2 * c.table.pairs < c.key_dim), shelf{memory} {
        kept = shelf.take<Kept>(1);
        still_query = shelf.take<Number>(Products::packed_numbers(rows, key_dim));
        turned_query = shelf.take<Turned>(Products::packed_turned_numbers(rows, turned_dim));
        extension_query = shelf.take<Number>(Products::packed_numbers(rows, extension_dim));
        raw = shelf.take<Number>(TILE * raw_dim);
        values = shelf.take<Number>(c.shares_value ? 0 : TILE * value_dim);
        turned = shelf.take<Turned>(up(strip_tokens, Products::KEYS) * turned_dim);
        extension = shelf.take<Number>(TILE * extension_dim);
        turning = shelf.take<float>(rows * turned_dim);
        made = shelf.take<float>(rows * (key_dim + extension_dim));
        scale = shelf.take<float>(key_dim);
        turning_scale = shelf.take<float>(turned_dim);
        turns = shelf.take<float>((c.table.is_steady ? strip_tokens / 2 + 1 : 1) * turned_dim);
        turn_of_strip = shelf.take<float>(turned_dim);
        turn_of_queries = shelf.take<float>(turned_dim);
        row = shelf.take<float>(8 * W + raw_dim + value_dim + 3 * turned_dim + extension_dim);
        logits = shelf.take<float>(rows * TILE);
        view = {shelf.take<uint8_t>(call.queries * TILE), shelf.take<uint8_t>(TILE)};
        places = shelf.take<int32_t>(order_of(c.key, dim_to_read()).most_lines());
        places_of_values = shelf.take<int32_t>(c.shares_value ? 0 : order_of(c.value, c.value_dim).most_lines());
        places_of_extension = shelf.take<int32_t>(c.extension_dim ? order_of(c.extension, c.extension_dim).most_lines() : 0);
        products = shelf.take<char>(static_cast<int64_t>(Products::scratch_bytes(rows, value_dim > key_dim ? value_dim : key_dim)));
    }

    void run(int64_t first, int64_t last, Part part) {
        const int64_t stride = up(call.value_dim, PADDING);
        for (int64_t r = 0; r < rows; ++r) part.greatest[r] = NOTHING, part.total[r] = 0;
        std::memset(part.values, 0, static_cast<size_t>(rows * stride) * 4);
        bool is_ready = false;
        for (int64_t begin = first, count; begin < last; begin += count) {
            count = last - begin < tile_tokens ? last - begin : tile_tokens;
            if (call.pages && count > call.page_tokens - begin % call.page_tokens) count = call.page_tokens - begin % call.page_tokens;
            const Sight sight = view.look(call, sequence, begin, count);
            if (sight == Sight::none) continue;
            if (!is_ready) {
                Products::start();
                pack_queries();
                look_ahead();
                is_ready = true;
            }
            look_at(begin, count, sight == Sight::some, part, stride);
        }
        if (!is_ready) return;
        Products::stop();
        if (const float* scales = channels(call.value_scales))
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < call.value_dim; ++i) part.values[r * stride + i] *= scales[i];
    }

   private:
    // Of a row of keys.
    int64_t dim_to_read() const { return call.shares_value && call.value_dim > call.key_dim ? call.value_dim : call.key_dim; }

    Order order_of(const Rows& rows_of, int64_t dim) const { return {rows_of, dim, tile_tokens}; }

    void look_ahead() {
        of_keys = {places, order_of(call.key, dim_to_read()).make(places)};
        if (!call.shares_value) of_values = {places_of_values, order_of(call.value, call.value_dim).make(places_of_values)};
        if (call.extension_dim) of_extension = {places_of_extension, order_of(call.extension, call.extension_dim).make(places_of_extension)};
    }

    const float* channels(const Scales& scales) const {
        return scales.of_channels ? scales.of_channels + sequence * scales.batch_stride + head * scales.head_stride : nullptr;
    }

    // Row r is query r % T of head r / T of the group.
    const float* query_of(int64_t r) const {
        const int64_t group = call.heads / call.kv_heads;
        const int64_t index = (sequence * call.heads + head * group + r / call.queries) * call.queries + r % call.queries;
        return call.query + index * (call.key_dim + call.extension_dim);
    }

    // The queries as the products want them: times the scale of the key's dimensions, those that turn by themselves.
    void pack_queries() {
        const Table& table = call.table;
        const float* codes = channels(call.key_scales);
        for (int64_t i = 0; i < call.key_dim; ++i) scale[i] = (call.key_scale ? call.key_scale[i] : 1.0f) * (codes ? codes[i] : 1.0f);
        pack(extension_query, extension_dim, [&](const float* query, float* to) { std::memcpy(to, query + call.key_dim, static_cast<size_t>(call.extension_dim) * 4); });
        pack(still_query, has_still ? key_dim : 0, [&](const float* query, float* to) {
            for (int64_t i = 0; i < call.key_dim; ++i) to[i] = query[i] * scale[i];
            for (int64_t i = 0; i < table.pairs; ++i) to[i] = to[table.distance + i] = 0.0f;
        });
        if (does_turn) pack_turned_queries();
    }

    void pack_turned_queries() {
        const Table& table = call.table;
        for (int64_t r = 0; r < rows; ++r) arrange(query_of(r), query_of(r) + table.distance, turning + r * turned_dim);
        arrange(scale, scale + table.distance, turning_scale);
        std::memset(turned_query, 0, static_cast<size_t>(Products::packed_turned_numbers(rows, turned_dim)) * sizeof(Turned));
        if (table.is_steady) return make_relative();
        Products::pack_turned(rows, turned_dim / 2, [&](int64_t r, int64_t i) { return pairs_to_turn(r, i); }, turned_query);
    }

    // The first and the second numbers of all pairs that turn, in the order of the products.
    void arrange(const float* first, const float* second, float* to) const {
        Products::arrange(first, call.table.pairs, to);
        Products::arrange(second, call.table.pairs, to + turned_dim / 2);
    }

    Both pairs_to_turn(int64_t r, int64_t i) const {
        const float* a = turning + r * turned_dim + i;
        return {load(a), load(a + turned_dim / 2)};
    }

    template <class Make>
    void pack(Number* to, int64_t dim, Make make) {
        if (!dim) return;
        std::memset(to, 0, static_cast<size_t>(Products::packed_numbers(rows, dim)) * sizeof(Number));
        std::memset(made, 0, static_cast<size_t>(rows * dim) * 4);
        for (int64_t r = 0; r < rows; ++r) make(query_of(r), made + r * dim);
        Products::pack(made, rows, dim, to);
    }

    int64_t table_place(int64_t token) const {
        return (sequence * call.table.batch_stride + token * call.table.row_stride) * static_cast<int64_t>(bytes_of(call.table.kind));
    }

    void table_row(int64_t token, float* cosine, float* sine) const {
        const Table& table = call.table;
        widen_row(table.kind, table.cosine + table_place(token), table.pairs, cosine);
        widen_row(table.kind, table.sine + table_place(token), table.pairs, sine);
    }

    // Row i turns by as much as row i of the table does more than its first: so much more, or less, does the key turn that is i places after, or before,
    // another. One more row is that of a whole strip. Each thread makes them once for a call.
    void make_relative() {
        if (kept->serial == call.serial && (kept->sequence == sequence || call.table.batch_stride == 0)) return;
        float *first_cosine = row, *first_sine = row + call.table.pairs, *cosine = first_sine + call.table.pairs, *sine = cosine + call.table.pairs;
        table_row(0, first_cosine, first_sine);
        const auto relative = [&](int64_t token, float* to) {
            table_row(token, cosine, sine);
            for (int64_t i = 0; i < call.table.pairs; ++i) {
                const float c = cosine[i], s = sine[i], c0 = first_cosine[i], s0 = first_sine[i], square = c0 * c0 + s0 * s0;
                cosine[i] = (c * c0 + s * s0) / square;
                sine[i] = (s * c0 - c * s0) / square;
            }
            arrange(cosine, sine, to);
        };
        for (int64_t k = 0; k <= strip_tokens / 2 && k < call.keys; ++k) {
            relative(k, turns + k * turned_dim);
            enlarge(turns + k * turned_dim);
        }
        if (strip_tokens < call.keys) relative(strip_tokens, turn_of_strip);
        *kept = {call.serial, sequence};
    }

    void make_turn(const float* cosine, const float* sine, float* to) const {
        arrange(cosine, sine, to);
        enlarge(to);
    }

    void enlarge(float* turn) const {
        for (int64_t i = 0; i < turned_dim; ++i) turn[i] *= Products::BEFORE_CUT;
    }

    // q . R(token) R(more) k = R(token)^T q . R(more) k: the queries are turned back once for a strip, and all strips turn by the same few rows. A row of the table has
    // to be waited for: for most strips R(token) is turned on from the strip before, as often as rounding allows.
    void turn_queries_back(int64_t token) {
        constexpr int64_t MOST_TURNED_ON = 7;
        const int64_t wide = turned_dim / 2;
        float *cosine = turn_of_queries, *sine = cosine + wide;
        if (token == token_of_queries + strip_tokens && turned_on < MOST_TURNED_ON) {
            ++turned_on;
            for (int64_t i = 0; i < wide; i += W) {
                const Floats c = load(cosine + i), s = load(sine + i), more_c = load(turn_of_strip + i), more_s = load(turn_of_strip + wide + i);
                store(cosine + i, c * more_c - s * more_s);
                store(sine + i, s * more_c + c * more_s);
            }
        } else {
            turned_on = 0;
            table_row(token, row, row + wide);
            make_turn(row, row + wide, turn_of_queries);
        }
        token_of_queries = token;
        const auto turned_back = [&](int64_t r, int64_t i) {
            const auto [x, y] = pairs_to_turn(r, i);
            const Floats c = load(cosine + i), s = load(sine + i);
            return Both{x * c + y * s, y * c - x * s};
        };
        Products::pack_turned(rows, wide, turned_back, turned_query);
    }

    struct Tile {
        const Number* data;
        int64_t stride;
    };

    // Rows [first, first + count) of a head, `count` filled up to `full`: where they lie, if they lie as the products want them, or a copy.
    Tile take(const Rows& rows_of, int64_t kv_head, int64_t dim, int64_t wide, int64_t first, int64_t count, int64_t full, bool some, Number* to, Ahead& ahead) {
        const char* from = row_of(call, rows_of, sequence, kv_head, first);
        const int64_t size = static_cast<int64_t>(bytes_of(rows_of.kind)), step = rows_of.row_stride * size;
        if (first + count < call.keys) ahead.begin(row_of(call, rows_of, sequence, kv_head, first + count));
        if (first + 2 * count < call.keys) Order::find_pages(row_of(call, rows_of, sequence, kv_head, first + 2 * count), count * step);
        if (rows_of.kind == OWN && dim == wide && count == full && !some) return {reinterpret_cast<const Number*>(from), rows_of.row_stride};
        for (int64_t k = 0; k < full; ++k, from += step) {
            Number* target = to + k * wide;
            if (k >= count || (some && view.hidden[k])) {
                std::memset(target, 0, static_cast<size_t>(wide) * sizeof(Number));
                continue;
            }
            copy(rows_of.kind, from, dim, target);
            if (wide > dim) std::memset(target + dim, 0, static_cast<size_t>(wide - dim) * sizeof(Number));
        }
        return {to, wide};
    }

    void copy(Kind kind, const char* from, int64_t dim, Number* to) const {
        if (kind == OWN) {
            std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(Number));
        } else if constexpr (OWN != Kind::i8) {
            if (kind == Kind::i8) return convert(reinterpret_cast<const int8_t*>(from), dim, to);
            widen_row(kind, from, dim, row);
            Products::narrow(row, to, dim);
        }
    }

    template <class Stored>
    static void convert(const Stored* from, int64_t dim, Number* to) {
        int64_t i = 0;
        for (; i + W <= dim; i += W) Products::put(to + i, widen(from + i));
        if (i == dim) return;
        float rest[W];
        widen_row(from + i, dim - i, rest);
        Products::narrow(rest, to + i, dim - i);
    }

    // The dimensions of `keys` that turn, scaled and turned.
    void turn(const Tile& keys, int64_t first, int64_t middle, int64_t count, int64_t full, Ahead& ahead) {
        const Table& table = call.table;
        Turning<Number> turning{keys.data, keys.stride, table.distance, table.pairs, turns, call.key_scale || call.key_scales.of_channels ? turning_scale : nullptr};
        if (table.is_steady) Products::turn(turning, middle, count, turned, ahead);
        for (int64_t k = 0; k < count && !table.is_steady; ++k) {
            float *cosine = row, *sine = row + table.pairs;
            table_row(first + k, cosine, sine);
            make_turn(cosine, sine, turns);
            Products::turn(turning, 0, 1, turned + k * turned_dim, ahead);
            turning.keys += keys.stride;
        }
        std::memset(turned + count * turned_dim, 0, static_cast<size_t>((full - count) * turned_dim) * sizeof(Turned));
    }

    void look_at(int64_t first, int64_t count, bool some, Part part, int64_t stride) {
        const int64_t full = up(count, Products::KEYS);
        const Tile keys = take(call.key, head, dim_to_read(), raw_dim, first, count, full, some, raw, of_keys);
        std::memset(logits, 0, static_cast<size_t>(rows * TILE) * 4);
        add_logits(keys, first, count, full, of_keys);
        if (call.key_scales.of_tokens) multiply(call.key_scales, first, count, some);  // codes alone: what extends a key is none
        if (call.extension_dim) {
            const Tile more = take(call.extension, 0, call.extension_dim, extension_dim, first, count, full, some, extension, of_extension);
            const Factors<Number> extended{extension_query, more.data, extension_dim, more.stride};
            Products::logits({extended, {}}, rows, full, logits, products, of_extension);
            of_extension.end();
        }
        weigh(first, count, some, part, stride, of_keys);
        const Tile summed = call.shares_value ? keys : take(call.value, head, call.value_dim, value_dim, first, count, full, some, values, of_values);
        Products::sums(logits, rows, value_dim, summed.data, summed.stride, full, part.values, stride, products, call.shares_value ? of_keys : of_values);
        of_keys.end();
        of_values.end();
    }

    void add_logits(const Tile& keys, int64_t first, int64_t count, int64_t full, Ahead& ahead) {
        Factors<Number> still{still_query, keys.data, has_still ? key_dim : 0, keys.stride};
        if (!does_turn) return Products::logits({still, {}}, rows, full, logits, products, ahead);
        for (int64_t at = 0; at < count; at += strip_tokens) {
            const int64_t now = count - at < strip_tokens ? count - at : strip_tokens, filled = up(now, Products::KEYS);
            const Tile strip{keys.data + at * keys.stride, keys.stride};
            if (call.table.is_steady) turn_queries_back(first + at + now / 2);
            turn(strip, first + at, now / 2, now, filled, ahead);
            still.keys = strip.data;
            Products::logits({still, {turned_query, turned, turned_dim, turned_dim}}, rows, filled, logits + at, products, ahead);
        }
    }

    // Logits become exp(logit - greatest), 0 where nothing is seen; what was summed before is scaled to the new greatest one.
    void weigh(int64_t first, int64_t count, bool some, Part part, int64_t stride, Ahead& ahead) {
        const int64_t padded_count = up(count, W);
        for (int64_t r = 0; r < rows; ++r) {
            float* x = logits + r * TILE;
            Floats best = all(NOTHING);
            for (int64_t k = 0; k < padded_count; k += W) {
                Floats l = load(x + k) * call.scale;
                if (call.soft_cap > 0) l = call.soft_cap * tanh(l / call.soft_cap);
                store(x + k, l);
            }
            for (int64_t k = count; k < padded_count; ++k) x[k] = NOTHING;
            if (some)
                for (int64_t k = 0; k < count; ++k)
                    if (!view.seen[r % call.queries * TILE + k]) x[k] = NOTHING;
            for (int64_t k = 0; k < padded_count; k += W) best = greater(best, load(x + k));
            const float tile_best = greatest(best), old = part.greatest[r], now = old < tile_best ? tile_best : old;
            const float origin = now == NOTHING ? 0.0f : now;
            Floats total = {};
            for (int64_t k = 0; k < padded_count; k += W) {
                const Floats weight = exp(load(x + k) - origin);
                total += weight;
                store(x + k, weight);
            }
            for (int64_t k = padded_count; k < TILE; ++k) x[k] = 0;
            if (now != old) {
                const float shrink = exp(all(old - origin))[0];
                part.total[r] *= shrink;
                for (int64_t i = 0; i < stride; ++i) part.values[r * stride + i] *= shrink;
                part.greatest[r] = now;
            }
            part.total[r] += sum(total);
            ahead.go(12 * count / W);
        }
        if (call.value_scales.of_tokens) multiply(call.value_scales, first, count, some);
    }

    // Logits, or weights, by the scales of their tokens; those of tokens that nobody sees may be anything.
    void multiply(const Scales& scales, int64_t first, int64_t count, bool some) {
        int64_t batch = sequence, token = first;
        if (call.pages) {
            batch = call.pages[sequence * call.pages_per_sequence + first / call.page_tokens];
            token = first % call.page_tokens;
        }
        const float* from = scales.of_tokens + batch * scales.batch_stride + head * scales.head_stride + token * scales.row_stride;
        alignas(64) float factors[TILE] = {};
        if (scales.row_stride == 1)
            std::memcpy(factors, from, static_cast<size_t>(count) * 4);
        else
            for (int64_t k = 0; k < count; ++k) factors[k] = from[k * scales.row_stride];
        for (int64_t k = 0; some && k < count; ++k)
            if (view.hidden[k]) factors[k] = 0;
        for (int64_t k = 0; k < count; k += W) {
            const Floats factor = load(factors + k);
            for (int64_t r = 0; r < rows; ++r) store(logits + r * TILE + k, load(logits + r * TILE + k) * factor);
        }
    }
};

template <class Products>
size_t scratch_bytes(const Call& call) {
    return Attention<Products>(call, 0, 0, nullptr).shelf.used;
}

template <class Products>
void attend(const Call& call, int64_t sequence, int64_t kv_head, int64_t first, int64_t last, char* scratch, Part part) {
    Attention<Products>(call, sequence, kv_head, scratch).run(first, last, part);
}

}  // namespace
