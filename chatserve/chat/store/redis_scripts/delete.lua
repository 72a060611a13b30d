-- owner, conversation, page names (32 bytes each, in a row) beside those that are kept.
-- Answers: ok, the replies that were running | gone
if not owned(ARGV[1]) then return pack(answer('gone')) end
local row = answer('ok')
-- What is damaged can be deleted too.
for _, reply in ipairs(redis.pcall('HKEYS', RUNNING)) do add(row, reply) end
local names = redis.pcall('HVALS', NAMES)
names[#names + 1] = ARGV[3]
-- From here on it is gone, and what is left says what the tiers of the cache have yet to forget.
redis.call('HSET', DELETIONS, ARGV[2], ARGV[1])
for i = 1, #names do
  if names[i] ~= '' then redis.call('RPUSH', FORGOTTEN, names[i]) end
end
for i = 2, row.n do redis.call('UNLINK', LOG .. row[i]) end
redis.call('UNLINK', META, PARENTS, TURNS, IDS, ASKS, REPLIES, RUNNING, ENDED, REFUSED, NAMES)
return pack(row)
