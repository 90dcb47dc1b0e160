-- Applies charges to one shard, each once, in order: what rule.py says, beside the state that it is about.
--
-- KEYS    state     a hash; layout.py lists its fields
--         ledger    a stream; an entry has up to 50 decisions of one call, and the number of the last one as its id
--         holds     a sorted set: account, end and id of each hold, by which those that ran out are found
-- ARGV    verb      'decide', or 'dry' to write nothing
--         seen      the last decision of this shard that the caller knows of
--         levels    how many levels of the index the caller expects, 1 to 4
--         kept      what ended by then is no longer kept                                                  (instant)
--         now       the store's clock                                                                     (instant)
--         cases     how many cases follow; each is
--                     account, version, key, facts, way, allowance, tally, span, stem, told
--         charges   all that follows; each is
--                     case, place, id, rest, amount, mark
-- RETURN  last, then one answer a charge: its place, a letter, and what belongs to it
--           D line                   decided; the line is the first of its record
--           R number facts record    decided before
--           S number                 the same as an earlier charge of this call
--           V change                 rests on an outdated enrollment
--           U number                 so does this, of the same account as an earlier charge of this call
--           A                        ahead of the clock
--           K line                   held; the line is the first of what is kept of the hold
--           L hold                   held before
--           X                        holds of the account ran out of time; they are to be ended first
--           W                        an earlier charge of its account in this call is to be dealt with first
--           G                        the hold that ran out of time is gone
--           T                        a correction that is not the next one
--           C                        a correction in a window that is no longer kept
--         or 'facts': the facts of a case are not known here; nothing was done
-- ERROR   GRATISBEHIND last          the state does not reach as far as the ledger, or as `seen`; nothing was done
--         GRATISPART last            the ledger refused a later entry of several, or what was to be held beside it
--                                    could not be: the state is behind the first ones
--         GRATISSTATE text           something is not as it should be; nothing was done
--
-- An instant is 18 digits of microseconds, so that comparing text compares time; a span is 'start end'. A way is
-- three letters: x excluded, c calendar, r rolling; counts f free, a all; overage w whole, e excess, u excess of what
-- is not tokens. A link begins with its stem (chain.py); told is the span as records have it; where nothing covers a
-- case, its tally is the link of what is outside any window. A mark is A if ahead; else, where windows roll, 'at start
-- end spare', and behind a ';', if there is more to do than to decide, one of
--           H until expiry bound     hold: until then; d decided or r released; `rest` is what else is kept of it
--           E bound span             decide by its bound, if its hold ran out of time                 (span or '-')
--           U bound span             decide by its bound                                              (span or '-')
--           C pin returned number id correct as the `number`th what was said of this id          (instant or '-')
--
-- One write commits a decision: XADD, whose id makes it fail where the ledger is further than the state. All checks
-- come before it. HSET after it only derives: should it fail, the next call finds the state behind, and it is derived
-- anew. A hold is in no ledger: it moves no tokens.

local HEAD, CASE, CHARGE, PART, RECORDS = 6, 10, 6, 4000, 50
local UNCHAINED = '000000000000000000000000'
local NO_SPAN, HAS_SPAN = 13, 22 -- bytes of a record before its id
local LEVEL_MAX = { 8192, 131072, 2097152 } -- ids on each level of the index but the last: 32 a field
local state, ledger, holds, ARGS = KEYS[1], KEYS[2], KEYS[3], ARGV
local is_dry, kept, now = ARGS[1] == 'dry', ARGS[4], ARGS[5]
local sub, match, find, format, floor = string.sub, string.match, string.find, string.format, math.floor
local call, sha1hex, char = redis.call, redis.sha1hex, string.char

local function wrong(text)
  return redis.error_reply('GRATISSTATE ' .. text)
end

-- A window's tally as the state has it, or nothing if it cannot be read: used, seq, span, is open, is changed, link.
local function read_tally(text)
  local used, seq, span, link = text:match('^(%d+) (%d+) (%d+ %d+)(.*)$')
  if used and #span == 37 and #used <= 16 and #seq <= 15 then
    if link == '' then -- it was written before there were links
      return { used + 0, seq + 0, span, true, false, UNCHAINED }
    elseif #link == 25 and link:find('^ %x+$') then
      return { used + 0, seq + 0, span, true, false, link:sub(2) }
    end
  end
end

-- The digits of a link as bytes: half as many.
local function packed(link)
  local a, b, c = tonumber(sub(link, 1, 8), 16), tonumber(sub(link, 9, 16), 16), tonumber(sub(link, 17, 24), 16)
  return char(floor(a / 16777216), floor(a / 65536) % 256, floor(a / 256) % 256, a % 256,
    floor(b / 16777216), floor(b / 65536) % 256, floor(b / 256) % 256, b % 256,
    floor(c / 16777216), floor(c / 65536) % 256, floor(c / 256) % 256, c % 256)
end

-- The rule: what becomes of a charge, and of the tally of its window. Says the line of its record, and whether the
-- window opens with it; or, in third place, what is wrong. (It is given all that it knows: what a function takes from
-- around it costs more here than an argument.)
local function judge(way, amount, allowance, span, tally, mark, kept, trimmed, is_dry)
  local kind, spare = way:sub(1, 1), 0
  if kind == 'x' then
    return 'x'
  end
  local used, seq, is_open = tally[1], tally[2], tally[4]
  if kind == 'r' then
    span, spare = mark:sub(20, 56), mark:sub(58)
    if not (#spare <= 13 and spare:match('^%d+$')) then
      return nil, nil, 'an argument is no number'
    end
    if is_open and mark:sub(1, 18) < tally[3]:sub(20) then
      span = tally[3]
    else -- none is open: this one would open one
      used, seq, is_open = 0, 0, false
    end
  end
  if span:sub(20) <= kept or (kind == 'r' and mark:sub(1, 18) <= trimmed) then
    return 'l'
  end
  if not (#amount <= 13 and amount:match('^%d+$') and #allowance <= 15 and allowance:match('^%d+$')) then
    return nil, nil, 'an argument is no number'
  end
  local counts, overage = way:sub(2, 2), way:sub(3, 3)
  amount, allowance = amount + 0, allowance + 0
  local is_free, free = amount <= allowance - used, amount
  if not is_free then
    free = 0
    if overage ~= 'w' and allowance > used then
      free = allowance - used
    end
  end
  if kind == 'r' and not is_open and not is_free and (overage ~= 'e' or free + spare == 0) then
    return ('n %d'):format(amount)
  end
  used, seq = used + (counts == 'a' and amount or free), seq + 1
  if used > 9007199254740991 then -- beyond this a number of Lua is no longer exact
    return nil, nil, 'a window has used more than can be counted exactly'
  end
  local line = (is_free and 'w %d %d ' or 'o %d %d %d %d '):format(used, seq, amount, free)
  if kind == 'r' then
    line = line .. span
  end
  if not is_dry then
    tally[1], tally[2], tally[3], tally[4], tally[5] = used, seq, span, true, true
  end
  return line, not is_open
end

-- What an id's first decision says, if a field of the index has it: the field names candidates, their records tell.
local function recall(ids, from, short, account, id, state, ledger)
  while from do
    if from % 10 == 1 then
      local number = 0
      for digit = from + 5, from + 9 do
        number = number * 256 + ids:byte(digit)
      end
      local found = redis.call('XRANGE', ledger, ('%d-0'):format(number), '+', 'COUNT', 1)[1]
      local back = found and found[1]:match('^(%d+)%-0$') - number
      local record
      for at = found and #found[2] - 1 or 0, 1, -2 do
        if found[2][at] == 'r' then
          if back == 0 then
            record = found[2][at + 1]
          end
          back = back - 1
        end
      end
      if record then
        local whose, facts = record:match('^(%d+) (%d+) ')
        local before_id = record:find('\n', 1, true)
        local told = record:byte(before_id + 1)
        before_id = before_id + (told == 1 and HAS_SPAN or told == 0 and NO_SPAN or 0)
        if whose == account and record:sub(before_id + 1, before_id + #id) == id then
          local text = redis.call('HGET', state, 'w' .. facts)
          return text and ('R%d '):format(number) .. text .. '\n' .. record, not text
        end
      else
        return nil, true
      end
    end
    from = ids:find(short, from + 1, true)
  end
end

-- All that is needed of the state, in one read: the counters; of each case its account, the version of the enrollment,
-- the number of its facts, its tally, and when the first of its holds runs out, or before; of each charge the fields of
-- the index. A lone charge is read without a list.
local values
local cases, levels = 1, 1
if #ARGS == HEAD + CASE + CHARGE and ARGS[3] == '1' then
  values = call('HMGET', state, 'n', 'a' .. ARGS[7], 'v' .. ARGS[7], 'f' .. ARGS[9], ARGS[13], 'x' .. ARGS[7],
    'i' .. sub(ARGS[18], 1, 2))
else
  cases, levels = tonumber(ARGS[6]), tonumber(ARGS[3])
  local names, size = { 'n' }, 1
  for at = HEAD, HEAD + (cases - 1) * CASE, CASE do
    names[size + 1], names[size + 2] = 'a' .. ARGS[at + 1], 'v' .. ARGS[at + 1]
    names[size + 3], names[size + 4], names[size + 5] = 'f' .. ARGS[at + 3], ARGS[at + 7], 'x' .. ARGS[at + 1]
    size = size + 5
  end
  for at = HEAD + cases * CASE + 2, #ARGS, CHARGE do
    for level = 2, levels + 1 do
      size = size + 1
      names[size] = 'i' .. sub(ARGS[at], 1, level)
    end
  end
  values = {}
  for from = 1, size, PART do
    local upto = math.min(from + PART - 1, size)
    local part = call('HMGET', state, unpack(names, from, upto))
    for i = from, upto do
      values[i] = part[i - from + 1]
    end
  end
end
local charges = HEAD + cases * CASE
local count = (#ARGS - charges) / CHARGE

local last, base, words, top, kept_here = match(values[1] or '0 0 0 1 ', '^(%d+) (%d+) (%d+) (%d) (%d*)$')
if not last then
  return wrong('the counters cannot be read')
end
if last ~= ARGS[2] and not (tonumber(last) >= tonumber(ARGS[2])) then
  return redis.error_reply('GRATISBEHIND ' .. last)
end
if kept_here > kept then
  kept = kept_here
end
last = last + 0

-- The level of the index on which new ids go; on lower ones there may be older ones.
local level_now = 1
while level_now <= #LEVEL_MAX and last + count - base > LEVEL_MAX[level_now] do
  level_now = level_now + 1
end
top = math.max(top, level_now)

-- What changes: fields and values in turn. In a batch, where each is and what it says by now.
local written, size = { 0, 0, 0, 0, 0, 0, 0, 0 }, 0
local place_of, latest = {}, {}
local entry, told = { 0, 0, 0, 0 }, 0 -- the ledger's entry

local function set(name, value)
  local place = place_of[name]
  if not place then
    written[size + 1], size = name, size + 2
    place = size
    if count > 1 then
      place_of[name] = place
    end
  end
  written[place] = value
  if count > 1 then
    latest[name] = value
  end
end

local answers, fresh, outdated, tallies, decided = { 0, 0 }, {}, {}, {}, 0
local unmeasured, waiting = {}, {} -- ids decided by a bound in this call; accounts of which a charge is dealt with first
local gone, members, is_in = {}, {}, {} -- fields to delete; members of the sorted set, and whether each is to be in it

local function put(member, is_to_be)
  if is_in[member] == nil then
    members[#members + 1] = member
  end
  is_in[member] = is_to_be
end

-- What holds need, made where there are any: most calls know of none.
local function make_holding()
  local holding = {}
  call('ZRANGEBYLEX', holds, '-', '+', 'LIMIT', 0, 1) -- a key of another type says so now

  local function field_of(name)
    return latest[name] or call('HGET', state, name) or ''
  end

  local function sum_of(name)
    local text = field_of(name)
    return text == '' and 0 or text + 0
  end

  -- How often this was corrected, or what holds set aside of that: a number, 0 if there is no such field.
  holding.number, holding.field = sum_of, field_of

  -- What is kept of a hold, taken apart; nothing if there is no such hold.
  function holding.read(account, id)
    local text = field_of('h' .. account .. '\0' .. id)
    if text ~= '' then
      local till, aside, expiry, bound, span, place, rest =
        match(text, '^(%d+) (%d+) (%a) %a %S+ %S+ (%d+) ([-%d]+ ?%d*)\n([^\n]*)\n(.*)$')
      return {
        text = text, till = till, aside = aside, expiry = expiry, bound = bound, span = span, place = place,
        at = sub(rest, 2, 1 + string.byte(rest)),
      }
    end
  end

  -- Give back what a hold set aside.
  function holding.drop(account, id, hold)
    local name, sum = 'h' .. account .. '\0' .. id, 'g' .. account .. '\0' .. hold.place
    set(name, '')
    gone[#gone + 1] = name
    if hold.aside ~= '0' then
      local left = sum_of(sum) - hold.aside
      set(sum, left > 0 and format('%d', left) or '')
      if left <= 0 then
        gone[#gone + 1] = sum
      end
    end
    put(account .. '\0' .. hold.till .. id, false)
  end

  -- Whether other holds of an account ran out of time; and where none did, when the next one will. What this call has
  -- put into the set, or taken out of it, by now counts.
  function holding.others_ran_out(account, own)
    local prefix, first = account .. '\0', ''
    local function is_over(member)
      local till = sub(member, #prefix + 1, #prefix + 18)
      if first == '' or till < first then
        first = till
      end
      return till <= now and member ~= own
    end
    local from, upto = '[' .. prefix, '[' .. account .. '\1'
    for _, member in ipairs(call('ZRANGEBYLEX', holds, from, upto, 'LIMIT', 0, #members + 2)) do
      if is_in[member] ~= false and is_over(member) then
        return true
      end
    end
    for i = 1, #members do
      if is_in[members[i]] and sub(members[i], 1, #prefix) == prefix and is_over(members[i]) then
        return true
      end
    end
    set('x' .. account, first)
    return false, first
  end

  -- What rule.py admits: a hold fits if it would be free beside all others. Says the line of what is kept of it.
  function holding.admit(account, id, rest, step, way, amount, allowance, span, field, tally, mark, first_end)
    local till, expiry, bound = match(step, '^H(%d+) (%a) (%d+)$')
    local line, _, fault = judge(way, amount, allowance, span, tally, mark, kept, kept_here, true)
    if fault then
      return nil, fault
    end
    local letter, aside, used, others, place = sub(line, 1, 1), 0, '-', '-', ''
    if letter == 'x' or letter == 'l' then
      span = '-'
    else
      place = sub(field, #account + 3)
      used, others = tally[1], sum_of('g' .. account .. '\0' .. place)
      if sub(way, 1, 1) == 'r' then
        span = '-'
        if tally[4] and sub(mark, 1, 18) < sub(tally[3], 20) then
          span = tally[3]
          place = sub(place, 1, -5) .. sub(span, 1, 18)
          others = others + sum_of('g' .. account .. '\0' .. place)
        else -- none is open: it is held beside those of whatever window will be
          used = 0
        end
      end
      letter = 'o'
      if amount + 0 <= allowance - used - others then
        letter, aside = 'w', amount + 0
      end
      used, others = format('%d', used), format('%d', others)
    end
    line = format('%s %d %s %s %s %s %s %s', till, aside, expiry, letter, used, others, bound, span)
    if not is_dry then
      set('h' .. account .. '\0' .. id, line .. '\n' .. place .. '\n' .. rest)
      if aside > 0 then
        local sum = 'g' .. account .. '\0' .. place
        set(sum, format('%d', sum_of(sum) + aside))
      end
      if first_end == '' or till < first_end then
        set('x' .. account, till)
      end
      put(account .. '\0' .. till .. id, true)
    end
    return line
  end

  return holding
end

local holding

for i = 1, count do
  local at = charges + (i - 1) * CHARGE
  local nth = count == 1 and 1 or tonumber(ARGS[at + 1])
  local case, read = HEAD + (nth - 1) * CASE, 2 + (nth - 1) * 5
  local place, id, mark, account = ARGS[at + 2], ARGS[at + 3], ARGS[at + 6], ARGS[case + 1]
  local account_number = latest['a' .. account] or values[read]
  local short = sub(place, 6)
  local answer, is_lost, slot

  -- Was this id decided before?
  for level = 2, top + 1 do
    slot = 'i' .. sub(place, 1, level)
    local ids
    if level <= levels + 1 then
      ids = values[2 + cases * 5 + (i - 1) * levels + level - 2]
    else
      ids = call('HGET', state, slot)
    end
    local from = ids and find(ids, short, 1, true)
    if from and account_number then
      answer, is_lost = recall(ids, from, short, account_number, id, state, ledger)
      if is_lost then
        return wrong('a decision is not in the ledger, or its facts are gone')
      elseif answer then
        break
      end
    end
    if level == level_now + 1 then
      values.slot = latest[slot] or ids or ''
    end
  end
  local own = count > 1 and account .. '\0' .. id
  if not answer and own and fresh[own] then
    answer = format('S%d', fresh[own])
  end

  local is_decided = answer and true
  local step, verb, extra, returned, ends, pin, correction = '', '', '', 0, nil, nil, nil
  if mark ~= '' then
    local cut = find(mark, ';', 1, true)
    if cut then
      step, mark = sub(mark, cut + 1), sub(mark, 1, cut - 1)
      verb = sub(step, 1, 1)
    end
  end
  if answer and verb == '' and not is_dry and (unmeasured[own] or find(answer, '^R[^\n]*\n[^\n]*\tu')) then
    waiting[account] = true -- a settle that comes too late is made before what follows it
  elseif not answer and waiting[account] then
    answer = 'W'
  end
  if not answer and mark == 'A' then
    answer = 'A'
  end
  local version = values[read + 1] or '0'
  if not answer and verb ~= 'C' and version ~= ARGS[case + 2] then
    if outdated[account] then
      answer = format('U%d', outdated[account])
    else
      answer = 'V' .. (call('HGET', state, 'e' .. version .. '\0' .. account) or '')
      outdated[account] = i
    end
  end

  -- What holds and corrections have to say first.
  local first_end = holding and latest['x' .. account] or values[read + 4] or ''
  if verb ~= '' or (first_end ~= '' and not answer) then
    holding = holding or make_holding()
    if verb == 'C' and not answer then
      local number
      pin, returned, number, step = match(step, '^C(%S+) (%d+) (%d+) (.*)$')
      step, number = 'c' .. account .. '\0' .. step, number + 0
      local other = holding.read(account, id)
      if other then -- its own id is that of a request which is held
        answer = 'L' .. other.text
      elseif holding.number(step) ~= number - 1 then
        answer = 'T'
      end
      correction = number
    elseif not is_dry then
      ends = holding.read(account, id)
      local is_over = is_decided or (not answer and (not ends or ends.till > now or ends.expiry == 'r'))
      if verb == 'E' and is_over then
        if ends and ends.till <= now then -- it was decided before, or is just given back
          holding.drop(account, id, ends)
        end
        answer = answer or 'G'
      elseif not answer and ends and (verb == 'H' or sub(ARGS[at + 4], 2, 1 + #ends.at) ~= ends.at) then
        answer = 'L' .. ends.text
      elseif not answer and verb ~= 'E' and first_end ~= '' and first_end <= now then
        local others
        others, first_end = holding.others_ran_out(account, ends and account .. '\0' .. ends.till .. id)
        if others then
          answer, waiting[account] = 'X', true
        end
      end
    end
    if verb == 'E' or verb == 'U' then
      pin, extra = match(step, '^%a%d+ ([-%d]+)'), '\tu' .. sub(step, 2)
    elseif verb == '' and ends then
      pin, extra = sub(ends.span, 1, 18), '\ts' .. ends.bound .. ' ' .. ends.span
    end
  end

  local field, way, tally = ARGS[case + 7], ARGS[case + 5], nil
  if not answer then
    local before = sub(way, 1, 1) ~= 'x' and values[read + 3]
    tally = tallies[field]
    if not tally then
      tally = before and read_tally(before) or { 0, 0, '', false, false, UNCHAINED }
      if before and not tally[4] then
        return wrong('a tally cannot be read')
      end
      tallies[field] = tally
    end
    if pin and sub(way, 1, 1) == 'r' and sub(tally[3], 1, 18) ~= pin then
      local name = sub(field, 1, -5) .. pin -- it is about a window before the one that is open
      local other = tallies[name] or read_tally(holding.field(name))
      if other then
        field, tally, tallies[name] = name, other, other
      elseif correction and pin ~= '-' then
        answer = 'C' -- its window was trimmed
      end
    end
    if verb == 'H' then
      local line, fault = holding.admit(account, id, ARGS[at + 4], step, way, ARGS[at + 5], ARGS[case + 6],
        ARGS[case + 8], field, tally, mark, first_end)
      if fault then
        return wrong(fault)
      end
      answer = 'K' .. line
    elseif correction and not answer then -- what was said before is given back first
      if sub(way, 1, 1) == 'c' and sub(ARGS[case + 8], 20) <= kept then
        answer = 'C'
      elseif tally[1] < returned + 0 then
        return wrong('a correction returns more than was used')
      else
        tally[1] = tally[1] - returned
      end
    end
  end
  if not answer then
    local ended = tally[4] and tally[3]
    local used, seq, linked = tally[1], tally[2], tally[6]
    local line, is_new, fault =
      judge(way, ARGS[at + 5], ARGS[case + 6], ARGS[case + 8], tally, mark, kept, kept_here, is_dry)
    if fault then
      return wrong(fault)
    end
    if correction and line == 'l' then
      tally[1] = tally[1] + returned
      answer = 'C'
    elseif not is_dry then
      local facts = latest['f' .. ARGS[case + 3]] or values[read + 2]
      if not facts or not account_number then -- numbers that stand for texts from now on; the ledger says it first
        local function define(field, text)
          words = words + 1
          local number = format('%d', words)
          set(field, number)
          set('w' .. number, text)
          entry[told + 1], entry[told + 2], told = 'w', number .. ' ' .. text, told + 2
          return number
        end
        if not facts and ARGS[case + 4] == '' then
          return 'facts'
        end
        facts = facts or define('f' .. ARGS[case + 3], ARGS[case + 4])
        account_number = account_number or define('a' .. account, 'a' .. account)
      end
      local letter, rest = sub(line, 1, 1), ARGS[at + 4]
      local text, link, outside = letter, linked, nil
      if letter == 'w' or letter == 'o' then
        if letter == 'o' then
          text = format('o %d %d %s', tally[1], tally[2], tally[3])
        else -- the line says it already, but for a calendar's span
          text = #line < 38 and line .. tally[3] or line
        end
        link = is_new and UNCHAINED or linked
      else
        outside = 'o' .. account
        link = latest[outside] or call('HGET', state, outside) or UNCHAINED
      end
      link = sub(sha1hex(link .. ARGS[case + 9] .. text .. extra .. '\n' .. id .. rest), 1, 24)
      if outside then
        set(outside, link)
      else
        tally[6] = link
      end
      line = account_number .. ' ' .. facts .. ' ' .. line .. extra
      decided = decided + 1
      entry[told + 1], entry[told + 2] = 'r', line .. '\n' .. ARGS[case + 10] .. packed(link) .. id .. rest
      told = told + 2
      if own then
        fresh[own] = i
        unmeasured[own] = sub(extra, 2, 2) == 'u' or nil
      end
      if is_new and not (ended and sub(ended, 20) <= kept_here) then -- a window opens: the account's list names it
        local listed, name = 'l' .. account, sub(field, #account + 3)
        local list = latest[listed] or call('HGET', state, listed) or ''
        if ended then -- it rolls: the one before is kept under its own name
          name = sub(name, 1, -5) .. sub(ended, 1, 18)
          set('t' .. account .. '\0' .. name, format('%d %d %s %s', used, seq, ended, linked))
        end
        set(listed, list .. name .. '\n')
      end
      local number = last + decided
      set('i' .. sub(place, 1, level_now + 1), values.slot .. short .. string.char(
        floor(number / 4294967296), floor(number / 16777216) % 256, floor(number / 65536) % 256,
        floor(number / 256) % 256, number % 256))
      if ends then
        holding.drop(account, id, ends)
      elseif correction then
        set(step, format('%d', correction))
      end
    end
    answer = answer or 'D' .. line
  end
  answers[i + 1] = place .. answer
end

last = last + decided
answers[1] = last
if decided == 0 and size == 0 then
  return answers
end

-- Commit. An id says that nothing follows it, not that nothing stands before it: several decisions ask, and so do holds
-- without any, since what is left of an allowance is known only by a state that reaches as far as its ledger.
if (decided > 1 or (decided == 0 and #members > 0))
  and #call('XRANGE', ledger, format('%d-0', last - decided + 1), '+', 'COUNT', 1) > 0 then
  return redis.error_reply(format('GRATISBEHIND %d', last - decided))
end
-- Many decisions make several entries, each with its words before its records, so that one that is asked for
-- again is found in a short one.
local from, records = 1, 0
for to = 2, told, 2 do
  if entry[to - 1] == 'r' then
    records = records + 1
    if records % RECORDS == 0 or to == told then
      local added = redis.pcall('XADD', ledger, format('%d-0', last - decided + records), unpack(entry, from, to))
      if type(added) == 'table' and added.err then
        if from > 1 then
          return redis.error_reply(format('GRATISPART %d', last - decided))
        elseif find(added.err, 'equal or smaller', 1, true) then
          return redis.error_reply(format('GRATISBEHIND %d', last - decided))
        end
        return added
      end
      from = to + 1
    end
  end
end

-- Hold, and derive; the counters come last. Where something is held, the answer says so: then nothing may fail here.
local function failed(result)
  return decided == 0 and result or redis.error_reply(format('GRATISPART %d', last - decided))
end

local is_held = false
for i = 1, #members do
  if is_in[members[i]] then
    is_held = true
    local done = redis.pcall('ZADD', holds, 0, members[i])
    if type(done) == 'table' then
      return failed(done)
    end
  end
end
for field, tally in pairs(tallies) do
  if tally[5] then
    set(field, format('%d %d %s %s', tally[1], tally[2], tally[3], tally[6]))
  end
end
if decided > 0 then
  set('n', format('%d %s %s %d %s', last, base, words, top, kept_here))
end
if size > PART then -- in parts: what holds set aside, which nothing derives anew, is in the first one
  local first, rest = {}, {}
  for i = 1, size, 2 do
    local into = find(written[i], '^[hgx]') and first or rest
    into[#into + 1], into[#into + 2] = written[i], written[i + 1]
  end
  written = first
  for i = 1, #rest do
    written[#written + 1] = rest[i]
  end
end
for from = 1, size, PART do
  local done = redis.pcall('HSET', state, unpack(written, from, math.min(from + PART - 1, size)))
  if type(done) == 'table' then
    return (decided == 0 or is_held) and failed(done) or answers
  end
end
for i = 1, #gone do
  if count == 1 or latest[gone[i]] == '' then
    redis.pcall('HDEL', state, gone[i])
  end
end
for i = 1, #members do
  if not is_in[members[i]] then
    redis.pcall('ZREM', holds, members[i])
  end
end
return answers
