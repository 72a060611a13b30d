-- owner, reply. Answers: ok, record | gone
if not owned(ARGV[1]) or redis.call('HEXISTS', REPLIES, ARGV[2]) == 0 then
  return pack(answer('gone'))
end
local row = answer('ok')
add_record(row, ARGV[2])
return pack(row)
