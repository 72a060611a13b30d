-- reply. Answers: ok, then cursor, text, ids, prompt ids of each entry
local row = answer('ok')
for _, entry in ipairs(redis.call('XRANGE', LOG .. ARGV[1], '-', '+')) do
  local fields = {}
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
  if not fields.head then
    add(row, entry[1])
    add(row, fields.t)
    add(row, fields.i)
    add(row, fields.p)
  end
end
return pack(row)
