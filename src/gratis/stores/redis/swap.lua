-- Changes fields of a shard's state, if others still are what they were: enrolls, mends, and drops old tallies.
--
-- KEYS    state     a hash
--         ledger    a stream
--         holds     a sorted set
-- ARGV    expected  how many pairs of field and value follow that must hold now ('' for a field that is absent)
--         written   how many pairs of field and value follow that are to be written
--         dropped   all that follows: fields that are to be deleted
-- RETURN  1, or 0 if something was not as expected, and nothing was done
--
-- It also asks whether this user may do all that the scripts of this store need; with nothing to write, only that.

local state, ledger, holds = KEYS[1], KEYS[2], KEYS[3]
local last_expected = 2 + tonumber(ARGV[1]) * 2
local last_written = last_expected + tonumber(ARGV[2]) * 2

if redis.acl_check_cmd then
  local needed = {
    { 'HMGET', state, 'n' }, { 'HGET', state, 'n' }, { 'HSET', state, 'n', '0' }, { 'HDEL', state, 'n' },
    { 'XADD', ledger, '1-0', 'r', '' }, { 'XRANGE', ledger, '-', '+' }, { 'XLEN', ledger },
    { 'XTRIM', ledger, 'MINID', '0' }, { 'ZADD', holds, '0', '' }, { 'ZREM', holds, '' },
    { 'ZRANGEBYLEX', holds, '-', '+' },
  }
  for _, command in ipairs(needed) do
    if not redis.acl_check_cmd(unpack(command)) then
      return redis.error_reply('NOPERM this user may not run ' .. command[1] .. ' on the keys of this store')
    end
  end
end
redis.call('XLEN', ledger) -- a key of another type says so now
redis.call('ZRANGEBYLEX', holds, '-', '+', 'LIMIT', 0, 1)

for at = 3, last_expected, 2 do
  if (redis.call('HGET', state, ARGV[at]) or '') ~= ARGV[at + 1] then
    return 0
  end
end
if last_written > last_expected then
  redis.call('HSET', state, unpack(ARGV, last_expected + 1, last_written))
end
if #ARGV > last_written then
  redis.call('HDEL', state, unpack(ARGV, last_written + 1))
end
return 1
