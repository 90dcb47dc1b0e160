-- What becomes of holds without a decision: they are listed, extended, released.
--
-- KEYS    state     a hash
--         ledger    a stream
--         holds     a sorted set: account, end and id of each hold
-- ARGV    verb      'list', 'due', 'extend' or 'release'
--         account   whose holds these are
--         id        of which hold; to list, behind which end and id, '' for all
--         until     extend: to when; due: the store's clock                                             (instant)
--         most      how many to list
-- RETURN  account and id, as they were given; behind which end and id to go on, '' at the end; then what is kept of
--         each hold: to list, of those of the account, to ask what is due, of those that ran out, by their ends; else
--         of the one, if there is one
--
-- A hold moves no tokens, so nothing here is in the ledger. What is left of one that ended otherwise is mended in passing.

local state, holds, verb, account, id, till = KEYS[1], KEYS[3], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local first, last = '[' .. account .. '\0', '[' .. account .. '\1'
local asked, prefix = account .. '\0' .. id, #account + 1

-- When the first of the account's holds runs out, but for one of them; '' if there is no other.
local function first_end(own)
  for _, member in ipairs(redis.call('ZRANGEBYLEX', holds, first, last, 'LIMIT', 0, 2)) do
    if member ~= own then
      return string.sub(member, prefix + 1, prefix + 18)
    end
  end
  return ''
end

if verb == 'list' or verb == 'due' then
  local from, upto, most = first, last, tonumber(ARGV[5])
  if verb == 'due' then
    upto = '[' .. account .. '\0' .. till .. '\255'
  elseif id ~= '' then
    from = '(' .. account .. '\0' .. id
  end
  local found, stale = {}, {}
  local members = redis.call('ZRANGEBYLEX', holds, from, upto, 'LIMIT', 0, most)
  for _, member in ipairs(members) do
    local text = redis.call('HGET', state, 'h' .. account .. '\0' .. string.sub(member, prefix + 19))
    if text and string.sub(text, 1, 18) == string.sub(member, prefix + 1, prefix + 18) then
      found[#found + 1] = text
    else -- it ended, and its place in the set was left
      stale[#stale + 1] = member
    end
  end
  for _, member in ipairs(stale) do
    redis.call('ZREM', holds, member)
  end
  if #stale > 0 or (verb == 'due' and #found == 0) then
    redis.call('HSET', state, 'x' .. account, first_end())
  end
  return { asked, #members == most and string.sub(members[most], prefix + 1) or '', unpack(found) }
end

local field = 'h' .. account .. '\0' .. id
local text = redis.call('HGET', state, field) or ''
if text == '' then
  return { asked, '' }
end
local ends, aside = string.match(text, '^(%d+) (%d+)')
local member = account .. '\0' .. ends .. id
local next_end = first_end(member) -- a key of another type says so now
-- One HSET changes it whole. What comes after it only tidies up; should it fail, that is made good in passing.
if verb == 'extend' then
  text = till .. string.sub(text, 19)
  if next_end == '' or till < next_end then
    next_end = till
  end
  redis.call('ZADD', holds, 0, account .. '\0' .. till .. id)
  redis.call('HSET', state, field, text, 'x' .. account, next_end)
  if ends ~= till then
    redis.pcall('ZREM', holds, member)
  end
else
  local sum = 'g' .. account .. '\0' .. string.match(text, '^[^\n]*\n([^\n]*)')
  local before = redis.call('HGET', state, sum) or ''
  local left = before ~= '' and before - aside or 0
  redis.call('HSET', state, field, '', sum, left > 0 and string.format('%d', left) or '', 'x' .. account, next_end)
  redis.pcall('HDEL', state, field)
  if left <= 0 then
    redis.pcall('HDEL', state, sum)
  end
  redis.pcall('ZREM', holds, member)
end
return { asked, '', text }
