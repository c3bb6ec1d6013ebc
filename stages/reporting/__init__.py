"""What `stages.report` is made of: reading records, statistics, tables, figures, page, ledger."""
