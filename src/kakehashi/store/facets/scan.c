/* Counts over columns of dictionary codes: the part of the facets that must be quick.
 *
 * A scan goes over blocks of 4,096 rows, in several threads. Filters (a table that says for each
 * code whether it passes) thin out a block's rows one after the other, so that each looks only at
 * what the ones before it left. What is left is counted for all facets in the same pass.
 *
 * The layout of the structures is that of scan.py; FACETS_ABI changes with it.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FACETS_ABI 1
#define BLOCK 4096
#define CHUNK 16            /* blocks that a thread takes at once */
#define MAX_THREADS 64
#define MAX_STACK 64        /* of a program; the query language allows fewer levels */
#define MIN_ROWS 262144     /* below, starting threads costs more than it gains */

enum { OK = 0, CANCELLED = 1, NO_MEMORY = 2, BAD_PROGRAM = 3 };
enum { AND = -1, OR = -2, NOT = -3 };

typedef struct {
    const void *codes;      /* of `width` bytes; with width 0 a bit for each row */
    const uint8_t *pass;    /* 0 or 1 for each code, CAPACITY of them; NULL with width 0 */
    const uint8_t *zones;   /* for each block 0: no row passes, 1: look, 2: all do; or NULL */
    int64_t width;
    int64_t size;           /* codes are below this */
} Filter;

typedef struct {
    const void *codes;
    const uint8_t *chosen;  /* 0 or 1 for each code, CAPACITY of them, NULL if all are chosen */
    int64_t width;
    int64_t size;           /* codes are below this */
    uint64_t *counts;       /* the answer; `size` of them, zero at the start */
} Facet;

typedef struct {
    int64_t rows;
    int64_t threads;
    const Filter *filters;  /* all must pass */
    int64_t filter_count;
    const Filter *terms;    /* what the program speaks of */
    const int32_t *program; /* postfix: a term's number, AND, OR, NOT; must hold, too */
    int64_t steps;
    const volatile int32_t *cancel;
} Scan;

int64_t facets_abi(void) { return FACETS_ABI; }

/* A damaged file must not make the scan leave its tables: tables have room for every code of one
 * or two bytes, and wider codes are looked at. */
#define CAPACITY(width, size) ((width) == 1 ? 256 : (width) == 2 ? 65536 : (size))
#define CODE_1(code, size) (code)
#define CODE_2(code, size) (code)
#define CODE_4(code, size) ((int64_t)(code) < (size) ? (code) : 0)

/* ---- which rows of a block pass ---- */

#define BIT(bits, row) ((((const uint8_t *)(bits))[(row) >> 3] >> ((row) & 7)) & 1)

#define THIN(TYPE, CODE)                                                        \
    {                                                                           \
        const TYPE *codes = (const TYPE *)f->codes + start;                     \
        const uint8_t *pass = f->pass;                                          \
        if (dense)                                                              \
            for (int i = 0; i < n; i++) {                                       \
                left[m] = (uint16_t)i;                                          \
                m += pass[CODE(codes[i], f->size)];                             \
            }                                                                   \
        else                                                                    \
            for (int q = 0; q < n; q++) {                                       \
                uint16_t i = left[q];                                           \
                left[m] = i;                                                    \
                m += pass[CODE(codes[i], f->size)];                             \
            }                                                                   \
    }

static int thin(const Filter *f, int64_t start, uint16_t *left, int n, int dense)
{
    int m = 0;
    switch (f->width) {
    case 1: THIN(uint8_t, CODE_1) break;
    case 2: THIN(uint16_t, CODE_2) break;
    case 4: THIN(uint32_t, CODE_4) break;
    default:
        for (int q = 0; q < n; q++) {
            uint16_t i = dense ? (uint16_t)q : left[q];
            left[m] = i;
            m += BIT(f->codes, start + i);
        }
    }
    return m;
}

#define TEST(TYPE, CODE)                                                        \
    {                                                                           \
        const TYPE *codes = (const TYPE *)f->codes + start;                     \
        for (int q = 0; q < n; q++) out[q] = f->pass[CODE(codes[left[q]], f->size)]; \
    }

static void test(const Filter *f, int64_t start, const uint16_t *left, int n, uint8_t *out)
{
    switch (f->width) {
    case 1: TEST(uint8_t, CODE_1) break;
    case 2: TEST(uint16_t, CODE_2) break;
    case 4: TEST(uint32_t, CODE_4) break;
    default: for (int q = 0; q < n; q++) out[q] = BIT(f->codes, start + left[q]);
    }
}

static void fill(uint16_t *left, int n)
{
    for (int i = 0; i < n; i++) left[i] = (uint16_t)i;
}

/* Returns how many rows of the block pass; `*dense` says that it is all, and `left` is not set. */
static int survivors(const Scan *s, int64_t block, uint16_t *left, int *dense, uint8_t *stack)
{
    int64_t start = block * BLOCK;
    int n = (int)(s->rows - start < BLOCK ? s->rows - start : BLOCK);
    *dense = 1;
    for (int64_t x = 0; x < s->filter_count; x++)
        if (s->filters[x].zones && !s->filters[x].zones[block]) return 0;
    for (int64_t x = 0; x < s->filter_count && n; x++) {
        const Filter *f = s->filters + x;
        if (f->zones && f->zones[block] == 2) continue;
        int m = thin(f, start, left, n, *dense);
        *dense = *dense && m == n;
        n = m;
    }
    if (!s->steps || !n) return n;
    if (*dense) fill(left, n);
    uint8_t *top = stack - BLOCK;
    for (int64_t x = 0; x < s->steps; x++) {
        int32_t step = s->program[x];
        if (step >= 0) {
            top += BLOCK;
            test(s->terms + step, start, left, n, top);
        } else if (step == NOT) {
            for (int q = 0; q < n; q++) top[q] ^= 1;
        } else {
            uint8_t *under = top - BLOCK;
            if (step == AND) for (int q = 0; q < n; q++) under[q] &= top[q];
            else for (int q = 0; q < n; q++) under[q] |= top[q];
            top = under;
        }
    }
    int m = 0;
    for (int q = 0; q < n; q++) {
        uint16_t i = left[q];
        left[m] = i;
        m += stack[q];
    }
    *dense = 0;
    return m;
}

static int program_is_sound(const Scan *s)
{
    int64_t depth = 0;
    for (int64_t x = 0; x < s->steps; x++) {
        int32_t step = s->program[x];
        if (step >= 0) depth++;
        else if (step == NOT) { if (depth < 1) return 0; }
        else if (step == AND || step == OR) { if (depth-- < 2) return 0; }
        else return 0;
        if (depth > MAX_STACK) return 0;
    }
    return depth == (s->steps > 0);
}

/* ---- threads ---- */

typedef struct Work Work;
struct Work {
    const Scan *scan;
    atomic_llong *next;     /* block */
    void (*block)(Work *, int64_t start, const uint16_t *left, int n, int dense);
    const Facet *facets;
    int64_t facet_count;
    uint32_t **tables;      /* of this thread; of each facet, or one for the cells */
    const int64_t *strides;
    int64_t cell_count;
    uint16_t *passing;      /* scratch, BLOCK each */
    uint8_t *fails, *which;
    int status;
};

static void *run(void *argument)
{
    Work *w = argument;
    const Scan *s = w->scan;
    int64_t blocks = (s->rows + BLOCK - 1) / BLOCK;
    uint16_t *left = malloc(BLOCK * sizeof *left);
    uint8_t *stack = malloc((s->steps ? MAX_STACK : 1) * BLOCK);
    w->passing = malloc(BLOCK * sizeof *w->passing);
    w->fails = malloc(BLOCK);
    w->which = malloc(BLOCK);
    if (!left || !stack || !w->passing || !w->fails || !w->which) w->status = NO_MEMORY;
    while (w->status == OK) {
        int64_t b = atomic_fetch_add(w->next, CHUNK), end = b + CHUNK < blocks ? b + CHUNK : blocks;
        if (b >= blocks) break;
        if (s->cancel && *s->cancel) w->status = CANCELLED;
        for (; b < end && w->status == OK; b++) {
            int dense, n = survivors(s, b, left, &dense, stack);
            if (n) w->block(w, b * BLOCK, left, n, dense);
        }
    }
    free(left); free(stack); free(w->passing); free(w->fails); free(w->which);
    return NULL;
}

static int run_all(Work *works, int64_t threads)
{
    pthread_t ids[MAX_THREADS];
    int64_t started = 1;
    for (; started < threads; started++)
        if (pthread_create(ids + started, NULL, run, works + started)) break;
    run(works);
    int status = works[0].status;
    for (int64_t t = 1; t < started; t++) {
        pthread_join(ids[t], NULL);
        if (works[t].status > status) status = works[t].status;
    }
    return status;
}

static int64_t thread_count(const Scan *s)
{
    if (s->rows < MIN_ROWS || s->threads < 1) return 1;
    return s->threads < MAX_THREADS ? s->threads : MAX_THREADS;
}

/* ---- facets ---- */

/* The same code in neighbouring rows would make each increment wait for the one before: facets
 * have four tables, used in turn, unless they are large. */
#define LANES(f) ((f)->width < 4 ? 4 : 1)
#define TABLE(f) CAPACITY((f)->width, (f)->size)

#define COUNT(TYPE, CODE)                                                       \
    {                                                                           \
        const TYPE *c = (const TYPE *)f->codes + start;                         \
        int q = 0;                                                              \
        if (dense) {                                                            \
            for (; q + 3 < n; q += 4) {                                         \
                t0[CODE(c[q], f->size)]++;                                      \
                t1[CODE(c[q + 1], f->size)]++;                                  \
                t2[CODE(c[q + 2], f->size)]++;                                  \
                t3[CODE(c[q + 3], f->size)]++;                                  \
            }                                                                   \
            for (; q < n; q++) t0[CODE(c[q], f->size)]++;                       \
        } else {                                                                \
            for (; q + 3 < n; q += 4) {                                         \
                t0[CODE(c[left[q]], f->size)]++;                                \
                t1[CODE(c[left[q + 1]], f->size)]++;                            \
                t2[CODE(c[left[q + 2]], f->size)]++;                            \
                t3[CODE(c[left[q + 3]], f->size)]++;                            \
            }                                                                   \
            for (; q < n; q++) t0[CODE(c[left[q]], f->size)]++;                 \
        }                                                                       \
    }

static void count_rows(const Facet *f, uint32_t *table, int64_t start, const uint16_t *left, int n,
                       int dense)
{
    int64_t step = LANES(f) == 4 ? TABLE(f) : 0;
    uint32_t *t0 = table, *t1 = t0 + step, *t2 = t1 + step, *t3 = t2 + step;
    switch (f->width) {
    case 1: COUNT(uint8_t, CODE_1) break;
    case 2: COUNT(uint16_t, CODE_2) break;
    default: COUNT(uint32_t, CODE_4)
    }
}

static uint32_t code_at(const Facet *f, int64_t row)
{
    switch (f->width) {
    case 1: return ((const uint8_t *)f->codes)[row];
    case 2: return ((const uint16_t *)f->codes)[row];
    default: return CODE_4(((const uint32_t *)f->codes)[row], f->size);
    }
}

#define MISSES(TYPE, CODE)                                                      \
    {                                                                           \
        const TYPE *c = (const TYPE *)f->codes + start;                         \
        for (int q = 0; q < n; q++) {                                           \
            uint8_t fail = !f->chosen[CODE(c[left[q]], f->size)];               \
            w->fails[q] += fail;                                                \
            w->which[q] |= fail ? (uint8_t)x : 0;                               \
        }                                                                       \
    }

/* A row that all choices pass counts for every facet; one that misses a single choice counts
 * for the facet of that choice alone. */
static void facets_block(Work *w, int64_t start, const uint16_t *given, int n, int dense)
{
    int choices = 0;
    const uint16_t *left = given;
    for (int64_t x = 0; x < w->facet_count; x++) {
        const Facet *f = w->facets + x;
        if (!f->chosen) continue;
        if (!choices++) {
            if (dense) {
                fill(w->passing, n);
                left = w->passing;
            }
            memset(w->fails, 0, (size_t)n);
            memset(w->which, 0, (size_t)n);
        }
        switch (f->width) {
        case 1: MISSES(uint8_t, CODE_1) break;
        case 2: MISSES(uint16_t, CODE_2) break;
        default: MISSES(uint32_t, CODE_4)
        }
    }
    if (choices) {
        int m = 0;
        for (int q = 0; q < n; q++) {
            uint16_t i = left[q];
            if (w->fails[q] == 1) {
                const Facet *f = w->facets + w->which[q];
                w->tables[w->which[q]][code_at(f, start + i)]++;
            }
            w->passing[m] = i;      /* never ahead of what is read */
            m += !w->fails[q];
        }
        dense = 0;
        n = m;
        left = w->passing;
    }
    for (int64_t x = 0; x < w->facet_count; x++)
        count_rows(w->facets + x, w->tables[x], start, left, n, dense);
}

/* Counts each facet's codes over the rows that pass the scan and all other facets' choices. */
int64_t facets_count(const Scan *s, const Facet *facets, int64_t facet_count)
{
    if (!program_is_sound(s) || facet_count > 255) return BAD_PROGRAM;
    Work works[MAX_THREADS];
    atomic_llong next = 0;
    int64_t threads = thread_count(s);
    int status = OK;
    memset(works, 0, sizeof works);
    for (int64_t t = 0; t < threads; t++) {
        works[t] = (Work){.scan = s, .next = &next, .block = facets_block, .facets = facets,
                          .facet_count = facet_count};
        works[t].tables = calloc((size_t)facet_count + 1, sizeof *works[t].tables);
        if (!works[t].tables) { status = NO_MEMORY; break; }
        for (int64_t x = 0; x < facet_count; x++) {
            works[t].tables[x] = calloc((size_t)(LANES(facets + x) * TABLE(facets + x)), 4);
            if (!works[t].tables[x]) status = NO_MEMORY;
        }
    }
    if (status == OK) status = run_all(works, threads);
    for (int64_t t = 0; t < threads; t++) {
        if (!works[t].tables) continue;
        for (int64_t x = 0; x < facet_count; x++) {
            const Facet *f = facets + x;
            uint32_t *table = works[t].tables[x];
            if (status == OK)
                for (int64_t lane = 0; lane < LANES(f); lane++)
                    for (int64_t c = 0; c < f->size; c++)
                        f->counts[c] += table[lane * TABLE(f) + c];
            free(table);
        }
        free(works[t].tables);
    }
    return status;
}

/* ---- cells of several columns together ---- */

static void cells_block(Work *w, int64_t start, const uint16_t *left, int n, int dense)
{
    if (!w->facet_count) {
        w->tables[0][0] += (uint32_t)n;
        return;
    }
    for (int q = 0; q < n; q++) {
        int64_t row = start + (dense ? q : left[q]), cell = 0;
        for (int64_t x = 0; x < w->facet_count; x++)
            cell += code_at(w->facets + x, row) * w->strides[x];
        if (cell < w->cell_count) w->tables[0][cell]++;
    }
}

/* Counts the rows that pass for each combination of codes; `cells` has `size` of them, zero. */
int64_t facets_cells(const Scan *s, const Facet *columns, int64_t column_count,
                     const int64_t *strides, uint64_t *cells, int64_t size)
{
    if (!program_is_sound(s)) return BAD_PROGRAM;
    Work works[MAX_THREADS];
    uint32_t *tables[MAX_THREADS];
    atomic_llong next = 0;
    int64_t threads = thread_count(s);
    int status = OK;
    for (int64_t t = 0; t < threads; t++) {
        tables[t] = calloc((size_t)size, sizeof **tables);
        if (!tables[t]) status = NO_MEMORY;
        works[t] = (Work){.scan = s, .next = &next, .block = cells_block, .facets = columns,
                          .facet_count = column_count, .strides = strides, .cell_count = size,
                          .tables = tables + t};
    }
    if (status == OK) status = run_all(works, threads);
    for (int64_t t = 0; t < threads; t++) {
        if (status == OK)
            for (int64_t c = 0; c < size; c++) cells[c] += tables[t][c];
        free(tables[t]);
    }
    return status;
}

/* ---- rows ---- */

/* Writes the numbers of passing rows, in order, without the first `skip` of them: whole blocks,
 * as long as they fit into `room`, which is at least a block. `*from` is the row to begin with, the
 * first of a block, and afterwards where to go on.
 * Returns how many were written, or minus the status. */
int64_t facets_rows(const Scan *s, int64_t *from, int64_t skip, uint32_t *out, int64_t room)
{
    if (!program_is_sound(s)) return -BAD_PROGRAM;
    int64_t blocks = (s->rows + BLOCK - 1) / BLOCK, found = 0, block = *from / BLOCK;
    uint16_t *left = malloc(BLOCK * sizeof *left);
    uint8_t *stack = malloc((s->steps ? MAX_STACK : 1) * BLOCK);
    int status = left && stack ? OK : NO_MEMORY;
    for (; status == OK && block < blocks; block++) {
        if (s->cancel && *s->cancel) { status = CANCELLED; break; }
        int dense, n = survivors(s, block, left, &dense, stack);
        if (n <= skip) { skip -= n; continue; }
        if (n - skip > room - found) break;
        for (int64_t q = skip; q < n; q++)
            out[found++] = (uint32_t)(block * BLOCK + (dense ? q : left[q]));
        skip = 0;
    }
    free(left); free(stack);
    *from = block * BLOCK;
    return status == OK ? found : -status;
}

/* ---- identifiers ---- */

/* Reads identifiers of the form 2.25.<number below 2**128> as numbers: high, low. `plain` says
 * for which it could; only those that would be written the same again. */
void facets_uid_keys(const char *text, const int64_t *offsets, int64_t n, uint64_t *keys,
                     uint8_t *plain)
{
    const unsigned __int128 most = ~(unsigned __int128)0;
    for (int64_t i = 0; i < n; i++) {
        const char *p = text + offsets[i];
        int64_t length = offsets[i + 1] - offsets[i];
        unsigned __int128 value = 0;
        int good = length > 5 && length <= 44 && !memcmp(p, "2.25.", 5) &&
                   (p[5] != '0' || length == 6);
        for (int64_t k = 5; good && k < length; k++) {
            unsigned digit = (unsigned)(p[k] - '0');
            good = digit < 10 && value <= (most - digit) / 10;
            value = value * 10 + digit;
        }
        plain[i] = (uint8_t)good;
        keys[2 * i] = good ? (uint64_t)(value >> 64) : 0;
        keys[2 * i + 1] = good ? (uint64_t)value : 0;
    }
}

/* Writes numbers as 2.25.<number>; `text` has room for 44 characters each. */
void facets_uid_text(const uint64_t *keys, int64_t n, char *text, int64_t *offsets)
{
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        unsigned __int128 value = (unsigned __int128)keys[2 * i] << 64 | keys[2 * i + 1];
        char digits[40];
        int k = 0;
        do digits[k++] = (char)('0' + (int)(value % 10)); while (value /= 10);
        offsets[i] = at;
        memcpy(text + at, "2.25.", 5);
        at += 5;
        while (k) text[at++] = digits[--k];
    }
    offsets[n] = at;
}
