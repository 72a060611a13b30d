-- owner, ask, digest. Answers: known, reply, record | new | gone | digest
local owner, ask, digest = unpack(ARGV)
if not owned(owner) then return pack(answer('gone')) end
local known = redis.call('HGET', ASKS, ask)
if not known then return pack(answer('new')) end
local old_digest, reply = string.match(known, '^(%x*) (.*)$')
if old_digest ~= digest then return pack(answer('digest')) end
local row = answer('known')
add(row, reply)
add_record(row, reply)
return pack(row)
