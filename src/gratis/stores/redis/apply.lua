-- Applies charges to one shard, each once, in order: what rule.py says, beside the state that it is about.
--
-- KEYS    state     a hash; layout.py lists its fields
--         ledger    a stream; one entry a call, whose id is the number of its last decision
-- ARGV    verb      'decide', or 'dry' to write nothing
--         seen      the last decision of this shard that the caller knows of
--         levels    how many levels of the index the caller expects, 1 to 4
--         kept      what ended by then is no longer kept                                                  (instant)
--         cases     how many cases follow; each is
--                     account, version, key, facts, way, allowance, tally, span
--         charges   all that follows; each is
--                     case, place, id, rest, amount, mark
-- RETURN  last, then one answer a charge: its place, a letter, and what belongs to it
--           D line                   decided; the line is the first of its record
--           R number facts record    decided before
--           S number                 the same as an earlier charge of this call
--           V change                 rests on an outdated enrollment
--           A                        ahead of the clock
--         or 'facts': the facts of a case are not known here; nothing was done
-- ERROR   GRATISBEHIND last          the state does not reach as far as the ledger, or as `seen`; nothing was done
--         GRATISSTATE text           something is not as it should be; nothing was done
--
-- An instant is 18 digits of microseconds, so that comparing text compares time; a span is 'start end'. A way is
-- three letters: x excluded, c calendar, r rolling; counts f free, a all; overage w whole, e excess, u excess of what
-- is not tokens. A mark is '', or A if ahead, or, where windows roll, 'at start end spare'.
--
-- One write commits: XADD, whose id makes it fail where the ledger is further than the state. All checks come
-- before it. HSET after it only derives: should it fail, the next call finds the state behind, and it is derived anew.

local HEAD, CASE, CHARGE, ENTRY, PART = 5, 8, 6, 10, 4000
local EXACT_MAX = 9007199254740991 -- beyond this a number of Lua is no longer exact
local LEVEL_MAX = { 8192, 131072, 2097152 } -- ids on each level of the index but the last: 32 a field
local state, ledger, ARGS = KEYS[1], KEYS[2], ARGV
local is_dry, levels, kept, cases = ARGS[1] == 'dry', tonumber(ARGS[3]), ARGS[4], tonumber(ARGS[5])
local charges = HEAD + cases * CASE
local count = (#ARGS - charges) / CHARGE
local sub, match, find, format, floor = string.sub, string.match, string.find, string.format, math.floor

-- All that is needed of the state, in one read: counters, accounts, facts, tallies, the index.
local names, size = { 'n' }, 1
for at = HEAD, charges - CASE, CASE do
  names[size + 1], names[size + 2] = 'a' .. ARGS[at + 1], 'v' .. ARGS[at + 1]
  names[size + 3], names[size + 4] = 'f' .. ARGS[at + 3], ARGS[at + 7]
  size = size + 4
end
for at = charges + 2, #ARGS, CHARGE do
  for level = 2, levels + 1 do
    size = size + 1
    names[size] = 'i' .. sub(ARGS[at], 1, level)
  end
end
local known = {}
for from = 1, size, PART do
  local upto = math.min(from + PART - 1, size)
  local values = redis.call('HMGET', state, unpack(names, from, upto))
  for i = from, upto do
    known[names[i]] = values[i - from + 1]
  end
end

local last, base, words, top, kept_here = match(known.n or '0 0 0 1 ', '^(%d+) (%d+) (%d+) (%d) (%d*)$')
if not last then
  return redis.error_reply('GRATISSTATE its counters cannot be read')
end
last, base, words, top = tonumber(last), tonumber(base), tonumber(words), tonumber(top)
if not (last >= tonumber(ARGS[2])) then
  return redis.error_reply('GRATISBEHIND ' .. last)
end
if kept_here > kept then
  kept = kept_here
end

-- The level of the index on which new ids go; on lower ones there may be older ones.
local level_now = 1
while level_now <= #LEVEL_MAX and last + count - base > LEVEL_MAX[level_now] do
  level_now = level_now + 1
end
if level_now > top then
  top = level_now
end
if top > levels then
  for at = charges + 2, #ARGS, CHARGE do
    for level = levels + 2, top + 1 do
      local name = 'i' .. sub(ARGS[at], 1, level)
      known[name] = redis.call('HGET', state, name)
    end
  end
end

local answers, fresh, tallies, decided = { 0 }, {}, {}, 0
local entry, fields, changed = {}, {}, {} -- the ledger's entry; fields that change, and to what

local function set(name, value)
  if not changed[name] then
    fields[#fields + 1] = name
  end
  changed[name], known[name] = value, value
end

-- The number that stands for a text from now on; the ledger says it first.
local function define(field, text)
  words = words + 1
  local number = format('%d', words)
  set(field, number)
  set('w' .. number, text)
  entry[#entry + 1] = 'w'
  entry[#entry + 1] = number .. ' ' .. text
  return number
end

for i = 1, count do
  local at = charges + (i - 1) * CHARGE
  local case = HEAD + (tonumber(ARGS[at + 1]) - 1) * CASE
  local place, id, mark = ARGS[at + 2], ARGS[at + 3], ARGS[at + 6]
  local account, way = ARGS[case + 1], ARGS[case + 5]
  local answer

  -- Was this id decided before? The index names candidates, their records tell.
  local account_number = known['a' .. account]
  if account_number then
    local short = sub(place, 6)
    for level = 2, top + 1 do
      local ids = known['i' .. sub(place, 1, level)]
      local from = ids and find(ids, short, 1, true)
      while from do
        if from % ENTRY == 1 then
          local number = 0
          for digit = from + 5, from + 9 do
            number = number * 256 + string.byte(ids, digit)
          end
          if number <= last then
            local found = redis.call('XRANGE', ledger, format('%d-0', number), '+', 'COUNT', 1)[1]
            local record
            local back = found and tonumber(match(found[1], '^(%d+)%-0$')) - number
            for place_of = found and #found[2] - 1 or 0, 1, -2 do
              if found[2][place_of] == 'r' then
                if back == 0 then
                  record = found[2][place_of + 1]
                end
                back = back - 1
              end
            end
            if not record then
              return redis.error_reply(format('GRATISSTATE decision %d is not in the ledger', number))
            end
            local whose, facts = match(record, '^(%d+) (%d+) ')
            local line_end = find(record, '\n', 1, true)
            if whose == account_number and sub(record, line_end + 1, line_end + #id) == id then
              local text = redis.call('HGET', state, 'w' .. facts)
              if not text then
                return redis.error_reply('GRATISSTATE the facts of a decision are gone')
              end
              answer = format('R%d ', number) .. text .. '\n' .. record
            end
          end
        end
        from = find(ids, short, from + 1, true)
      end
    end
  end
  local own = count > 1 and account .. '\0' .. id
  if own and not answer and fresh[own] then
    answer = format('S%d', fresh[own])
  end

  if not answer and mark == 'A' then
    answer = 'A'
  end
  local version = known['v' .. account] or '0'
  if not answer and version ~= ARGS[case + 2] then
    answer = 'V' .. (redis.call('HGET', state, 'e' .. version .. '\0' .. account) or '')
  end

  if not answer then
    local line = 'x'
    local kind = sub(way, 1, 1)
    if kind ~= 'x' then
      local field, span, spare = ARGS[case + 7], ARGS[case + 8], 0
      local tally, before = tallies[field], known[field]
      if not tally and before then
        local used, seq, of = match(before, '^(%d+) (%d+) (%d+ %d+)$')
        if not used or #of ~= 37 or #used > 16 or #seq > 15 then
          return redis.error_reply('GRATISSTATE a tally cannot be read')
        end
        tally = { used = tonumber(used), seq = tonumber(seq), span = of }
        tallies[field] = tally
      end
      if kind == 'r' then
        span, spare = sub(mark, 20, 56), sub(mark, 58)
        if not (#spare <= 13 and match(spare, '^%d+$')) then
          return redis.error_reply('GRATISSTATE an argument is no number')
        end
        spare = tonumber(spare)
        if tally and sub(mark, 1, 18) < sub(tally.span, 20) then
          span = tally.span
        else
          tally = nil -- the last window has ended
        end
      end
      if sub(span, 20) <= kept then
        line = 'l'
      else
        -- The rule.
        local amount, allowance = ARGS[at + 5], ARGS[case + 6]
        if not (#amount <= 13 and match(amount, '^%d+$') and #allowance <= 15 and match(allowance, '^%d+$')) then
          return redis.error_reply('GRATISSTATE an argument is no number')
        end
        amount, allowance = tonumber(amount), tonumber(allowance)
        local used, seq = 0, 0
        if tally then
          used, seq = tally.used, tally.seq
        end
        local counts, overage = sub(way, 2, 2), sub(way, 3, 3)
        local is_free, free = amount <= allowance - used, amount
        if not is_free then
          free = 0
          if overage ~= 'w' and allowance > used then
            free = allowance - used
          end
        end
        if kind == 'r' and not tally and not is_free and (overage ~= 'e' or free + spare == 0) then
          line = format('n %d', amount)
        else
          used, seq = used + (counts == 'a' and amount or free), seq + 1
          if used > EXACT_MAX then
            return redis.error_reply('GRATISSTATE a window has used more than can be counted exactly')
          end
          line = format(is_free and 'w %d %d' or 'o %d %d %d %d', used, seq, amount, free)
          if kind == 'r' then
            line = line .. ' ' .. span
          end
          if not is_dry then
            if not tally then -- a window opens: the account's list names it
              local listed, name = 'l' .. account, sub(field, #account + 3)
              if known[listed] == nil then
                known[listed] = redis.call('HGET', state, listed)
              end
              if before then -- it rolls: the one before is kept under its own name
                name = sub(name, 1, -5) .. sub(match(before, '%d+ %d+$'), 1, 18)
                set('t' .. account .. '\0' .. name, before)
              end
              set(listed, (known[listed] or '') .. name .. '\n')
              tally = {}
              tallies[field] = tally
            end
            tally.used, tally.seq, tally.span = used, seq, span
            set(field, format('%d %d %s', used, seq, span))
          end
        end
      end
    end
    if not is_dry then
      local facts = known['f' .. ARGS[case + 3]]
      if not facts then
        if ARGS[case + 4] == '' then
          return 'facts'
        end
        facts = define('f' .. ARGS[case + 3], ARGS[case + 4])
      end
      account_number = account_number or define('a' .. account, 'a' .. account)
      line = account_number .. ' ' .. facts .. ' ' .. line
      decided = decided + 1
      entry[#entry + 1] = 'r'
      entry[#entry + 1] = line .. '\n' .. id .. ARGS[at + 4]
      if own then
        fresh[own] = i
      end
      local number, slot = last + decided, 'i' .. sub(place, 1, level_now + 1)
      set(slot, (known[slot] or '') .. sub(place, 6) .. string.char(
        floor(number / 4294967296), floor(number / 16777216) % 256, floor(number / 65536) % 256,
        floor(number / 256) % 256, number % 256))
    end
    answer = 'D' .. line
  end
  answers[i + 1] = place .. answer
end

last = last + decided
answers[1] = last
if decided == 0 then
  return answers
end

-- Commit.
local added = redis.pcall('XADD', ledger, last .. '-0', unpack(entry))
if type(added) == 'table' and added.err then
  if find(added.err, 'equal or smaller', 1, true) then
    return redis.error_reply('GRATISBEHIND ' .. (last - decided))
  end
  return added
end

-- Derive; the counters come last.
set('n', format('%d %d %d %d %s', last, base, words, top, kept_here))
local written, at = {}, 0
for i = 1, #fields do
  written[at + 1], written[at + 2] = fields[i], changed[fields[i]]
  at = at + 2
  if at >= PART or i == #fields then
    local done = redis.pcall('HSET', state, unpack(written))
    if type(done) == 'table' and done.err then
      break
    end
    written, at = {}, 0
  end
end
return answers
