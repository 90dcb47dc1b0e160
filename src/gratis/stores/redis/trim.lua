-- Forgets the oldest decisions of a shard, which somebody has stored elsewhere and nobody can ask for any more.
--
-- KEYS    state     a hash
--         ledger    a stream
--         holds     a sorted set
-- ARGV    upto      the last decision to be forgotten: the id of an entry of the ledger
--         kept      what ended by then is no longer kept, from now on                                  (instant)
--         fields    all that follows: the fields of the index in which these decisions may be, and for each that was
--                   corrected the field that counts this, and what it says if its last correction is among them
-- RETURN  1, or 0 if they were forgotten before
--
-- An id is forgotten before its record: one that is asked for in between is decided anew, and is too late for any
-- window: those that ended by `kept` are kept no longer, and where windows roll, neither is a request from before it.

local state, ledger, upto, kept = KEYS[1], KEYS[2], tonumber(ARGV[1]), ARGV[2]
local ENTRY = 10
local last, base, words, top, kept_before =
  string.match(redis.call('HGET', state, 'n') or '', '^(%d+) (%d+) (%d+) (%d) (%d*)$')
if not last or upto > tonumber(last) then
  return redis.error_reply('GRATISSTATE there is no decision that far')
end
if upto <= tonumber(base) then
  redis.call('XTRIM', ledger, 'MINID', string.format('%d-0', base + 1)) -- should that have failed before
  return 0
end
if kept_before > kept then
  kept = kept_before
end
redis.call('XLEN', ledger) -- a key of another type says so now
local written = { 'n', string.format('%s %d %s %s %s', last, upto, words, top, kept) }
local dropped = {}
local i = 3
while i <= #ARGV and string.sub(ARGV[i], 1, 1) == 'i' do
  local ids = redis.call('HGET', state, ARGV[i])
  local from = 1
  while ids and from <= #ids do
    local number = 0
    for digit = from + 5, from + 9 do
      number = number * 256 + string.byte(ids, digit)
    end
    if number > upto then
      break
    end
    from = from + ENTRY
  end
  if ids and from > #ids then
    dropped[#dropped + 1] = ARGV[i]
  elseif from > 1 then
    written[#written + 1] = ARGV[i]
    written[#written + 1] = string.sub(ids, from)
  end
  i = i + 1
end
for at = i, #ARGV, 2 do
  if redis.call('HGET', state, ARGV[at]) == ARGV[at + 1] then
    written[#written + 1], written[#written + 2] = ARGV[at], ''
    dropped[#dropped + 1] = ARGV[at]
  end
end
redis.call('HSET', state, unpack(written))
if #dropped > 0 then
  redis.call('HDEL', state, unpack(dropped))
end
redis.call('XTRIM', ledger, 'MINID', string.format('%d-0', upto + 1))
return 1
