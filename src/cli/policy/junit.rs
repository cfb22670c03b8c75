//! A report in JUnit's XML, as CI servers read it: a suite a file, a case a case.

use std::fmt::Write as _;

use crate::governance::workbench::Coverage;

use super::folder::Complaint;
use super::test::Ran;

/// Text as XML may have it: in an attribute, or between tags.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\t' | '\n' | '\r' => {
                let _ = write!(out, "&#{};", u32::from(c));
            }
            // What XML 1.0 has no way to say.
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

const HEAD: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

struct Counted {
    tests: usize,
    failures: usize,
    errors: usize,
    seconds: f64,
}

impl Counted {
    fn of(ran: &[&Ran<'_>]) -> Self {
        let errors = ran.iter().filter(|r| r.outcome.decided.is_none()).count();
        let failures = ran.iter().filter(|r| !r.outcome.ok).count() - errors;
        Self { tests: ran.len(), failures, errors, seconds: ran.iter().map(|r| r.seconds).sum() }
    }
}

impl std::fmt::Display for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tests, failures, errors, seconds } = self;
        write!(f, "tests=\"{tests}\" failures=\"{failures}\" errors=\"{errors}\" skipped=\"0\" time=\"{seconds:.6}\"")
    }
}

/// What came of the cases.
pub(super) fn report(ran: &[Ran<'_>], coverage: &Coverage) -> String {
    let mut out = String::from(HEAD);
    let all: Vec<&Ran<'_>> = ran.iter().collect();
    let _ = writeln!(out, "<testsuites name=\"sop policy test\" {}>", Counted::of(&all));
    // The cases of a file follow each other.
    for of_file in ran.chunk_by(|a, b| a.file == b.file) {
        let Some(first) = of_file.first() else { continue };
        let name = escaped(&first.file.display().to_string());
        let _ = writeln!(out, "  <testsuite name=\"{name}\" {}>", Counted::of(&of_file.iter().collect::<Vec<_>>()));
        let _ = writeln!(out, "    <properties>");
        for (what, value) in [("policies", coverage.policies), ("covered", coverage.covered)] {
            let _ = writeln!(out, "      <property name=\"{what}\" value=\"{value}\"/>");
        }
        let _ = writeln!(out, "    </properties>");
        of_file.iter().for_each(|r| case(&mut out, &name, r));
        let _ = writeln!(out, "  </testsuite>");
    }
    let _ = writeln!(out, "</testsuites>");
    out
}

fn case(out: &mut String, file: &str, r: &Ran<'_>) {
    let (name, seconds) = (escaped(&r.outcome.name), r.seconds);
    let _ = write!(out, "    <testcase name=\"{name}\" classname=\"{file}\" file=\"{file}\" time=\"{seconds:.6}\"");
    if r.outcome.ok && r.outcome.warnings.is_empty() {
        let _ = writeln!(out, "/>");
        return;
    }
    let _ = writeln!(out, ">");
    if !r.outcome.ok {
        let what = if r.outcome.decided.is_none() { "error" } else { "failure" };
        let why = escaped(&r.outcome.said());
        let _ = writeln!(out, "      <{what} type=\"decision\" message=\"{why}\">{why}</{what}>");
    }
    if !r.outcome.warnings.is_empty() {
        let _ = writeln!(out, "      <system-err>{}</system-err>", escaped(&r.outcome.warnings.join("\n")));
    }
    let _ = writeln!(out, "    </testcase>");
}

/// Nothing could be run, and this is why.
pub(super) fn broken(complaints: &[Complaint]) -> String {
    let mut out = String::from(HEAD);
    let n = complaints.len();
    let counted = Counted { tests: n, failures: 0, errors: n, seconds: 0.0 };
    let _ = writeln!(out, "<testsuites name=\"sop policy test\" {counted}>\n  <testsuite name=\"bundle\" {counted}>");
    for c in complaints {
        let (file, why) = (escaped(&c.file.display().to_string()), escaped(&c.to_string()));
        let _ = writeln!(out, "    <testcase name=\"{file}\" classname=\"bundle\" file=\"{file}\" time=\"0.000000\">");
        let _ = writeln!(out, "      <error type=\"bundle\" message=\"{why}\">{why}</error>\n    </testcase>");
    }
    out.push_str("  </testsuite>\n</testsuites>\n");
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_xml_cannot_say_is_replaced_and_what_it_can_is_escaped() {
        assert_eq!(super::escaped("a<b>&\"'\n\u{1}\u{fffe}ä"), "a&lt;b&gt;&amp;&quot;&apos;&#10;\u{fffd}\u{fffd}ä");
    }
}
